"""The schedule: mu, sigmas and the shift that apply_dype sets."""

import pytest
from conftest import generate_latents

from dype import DyPEConfig, apply_dype, remove_dype
from dype.noise_schedule import noise_schedule


def test_shift(pipe):
    """With a cap, mu = max_shift at every size and method; without, the model's rule holds."""
    pipe.scheduler.register_to_config(base_image_seq_len=256, max_image_seq_len=4096)

    def mu():
        return [noise_schedule(pipe.scheduler, n, n, 4)[0] for n in (512, 1024, 2048, 4096)]

    stock = mu()
    assert stock[1:] == pytest.approx([1.15, 3.23, 11.55], abs=0.01)
    for config in (DyPEConfig(), DyPEConfig("base"), DyPEConfig("yarn", dype=False)):
        apply_dype(pipe, config)
        assert mu() == [1.15] * 4
    apply_dype(pipe, DyPEConfig(max_shift=1.5))
    assert mu() == [1.5] * 4
    apply_dype(pipe)
    assert mu() == [1.15] * 4
    apply_dype(pipe, DyPEConfig(shift="model"))
    assert mu() == stock
    apply_dype(pipe, DyPEConfig(shift="model", base_shift=0.0))
    assert mu()[0] < stock[0]
    remove_dype(pipe)
    assert mu() == stock
    with pytest.raises(ValueError, match="base_shift is"):
        apply_dype(pipe, DyPEConfig(base_shift=0.3))


def test_remove_keeps_a_foreign_change(pipe):
    """remove_dype leaves a setting that changed after apply_dype; a static schedule stays."""
    apply_dype(pipe)
    pipe.scheduler.register_to_config(base_shift=0.7)
    remove_dype(pipe)
    assert pipe.scheduler.config.base_shift == 0.7
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    before = dict(pipe.scheduler.config)
    with pytest.raises(ValueError, match="max_shift is 1, but this model's schedule is static"):
        apply_dype(pipe, DyPEConfig(max_shift=1))
    apply_dype(pipe)
    assert dict(pipe.scheduler.config) == before


def test_pipeline_uses_the_capped_schedule(pipe):
    """A capped run uses the sigmas that noise_schedule returns before it."""
    apply_dype(pipe, DyPEConfig("yarn", base_resolution=64))
    generate_latents(pipe, 512, 512, steps=5)
    mu, sigmas = noise_schedule(pipe.scheduler, 512, 512, 5)
    assert mu == 1.15
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1e-7)
    assert sigmas[-2] == pytest.approx(0.4412, abs=1e-4)
