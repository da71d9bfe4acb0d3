"""The schedule: mu, sigmas, the shift that apply_dype sets, and the warning where it is missing."""

import copy
import inspect
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import generate_latents, needs, quiet, tiny_components
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from tiny import FAMILIES

from dype import DyPEConfig, apply_dype, remove_dype
from dype.families import FLUX, FLUX2
from dype.noise_schedule import (
    ScheduleCheck,
    ScheduleWarning,
    check_scheduler,
    noise_schedule,
    set_shift,
)
from dype.patch import dype_applied

CAPPED = DyPEConfig("yarn", base_resolution=64)  # as FLUX's default
OWN_SCHEDULE = DyPEConfig("yarn", base_resolution=64, shift="model")
NUMBERS = DyPEConfig("yarn", base_resolution=64, shift="model", base_shift=0.2, max_shift=2.0)


def mu_of(scheduler, size=4096) -> float:
    return noise_schedule(scheduler, size, size, 4)[0]


def make_scheduler(**settings) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler with FLUX's rule for mu, which is the default of its class."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)


@pytest.fixture
def pipe() -> FluxPipeline:
    """Return a tiny FLUX pipeline with FLUX's rule for mu."""
    return quiet(FluxPipeline(**tiny_components() | {"scheduler": make_scheduler()}))


def test_rules_by_size():
    """Golden mu of FLUX at 1024, 2048, 3072 and 4096 px, and the last sigma of 28 at 4096 px.

    The table of docs/method.md has the same numbers.
    """
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    lines = page[page.index("| px | model |") :].splitlines()
    header, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in lines[:6])
    for row in rows[1:]:
        for rule, cell in zip(header[1:], row[1:], strict=True):
            scheduler, side = make_scheduler(), int(row[0])
            set_shift(scheduler, DyPEConfig(shift=rule), FLUX)
            mu, sigmas = noise_schedule(scheduler, side, side, 28)
            assert cell == f"{mu:.2f}, {sigmas[-2]:.3f}", (side, rule)
            assert mu == pytest.approx(RULES[rule][side // 1024 - 1], abs=5e-5)


RULES = {  # rule -> mu at 1, 2, 3 and 4 times 1024 px, from the publications' formulas
    "model": (1.15, 3.23, 6.6967, 11.55),
    "sqrt": (1.15, 2.0167, 2.8833, 3.75),
    "log": (1.15, 1.475, 1.6651, 1.8),
    "sd3": (1.15, 1.8431, 2.2486, 2.5363),
    "cap": (1.15, 1.15, 1.15, 1.15),
}


@pytest.mark.parametrize("rule", ["log", "sqrt", "sd3"])
def test_a_mu_of_no_size(rule):
    """A pipeline may pass any mu, also one below that of a single token."""
    scheduler = make_scheduler()
    set_shift(scheduler, DyPEConfig(shift=rule), FLUX)
    scheduler.set_timesteps(4, mu=-0.2)
    assert scheduler.sigmas.isfinite().all()


@pytest.mark.parametrize("rule", ["log", "sqrt", "sd3"])
def test_rules_that_a_model_refuses(rule):
    """A static schedule, a rule of the pipeline's own, and base_shift with sd3."""
    static, config = make_scheduler(), DyPEConfig(shift=rule)
    static.register_to_config(use_dynamic_shifting=False)
    with pytest.raises(ValueError, match=f"shift is {rule}, but this model's schedule is static"):
        check_scheduler(static, config, FLUX)
    with pytest.raises(ValueError, match=f"shift is {rule}, but this model's pipeline has its own"):
        check_scheduler(make_scheduler(), config, FLUX2)
    with pytest.raises(ValueError, match=r"base_shift is 0\.2, but mu does not depend on it"):
        check_scheduler(make_scheduler(), DyPEConfig(shift="sd3", base_shift=0.2), FLUX)


def test_shift(pipe):
    """With a cap, mu = max_shift at every size and method; without, the model's rule holds."""

    def mu():
        return [mu_of(pipe.scheduler, size) for size in (512, 1024, 2048, 4096)]

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
    pipe.scheduler.register_to_config(base_shift=0.7, max_shift=2.0)
    assert mu_of(pipe.scheduler) == 2.0  # the cap is the scheduler's max_shift
    remove_dype(pipe)
    assert pipe.scheduler.config.base_shift == 0.7
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    before = dict(pipe.scheduler.config)
    sigmas = noise_schedule(pipe.scheduler, 512, 512, 4)
    with pytest.raises(ValueError, match="max_shift is 1, but this model's schedule is static"):
        apply_dype(pipe, DyPEConfig(max_shift=1))
    apply_dype(pipe)
    assert dict(pipe.scheduler.config) == before
    assert noise_schedule(pipe.scheduler, 512, 512, 4) == sigmas


def test_pipeline_uses_the_capped_schedule(pipe):
    """A capped run uses the sigmas that noise_schedule returns before it."""
    apply_dype(pipe, CAPPED)
    mu, sigmas = noise_schedule(pipe.scheduler, 512, 512, 5)
    generate_latents(pipe, 512, 512, steps=5)
    assert mu == 1.15
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1e-7)
    assert sigmas[-2] == pytest.approx(0.4412, abs=1e-4)


@pytest.mark.parametrize("config", [CAPPED, NUMBERS])
def test_shift_does_not_leak_from_the_configuration(pipe, tmp_path, config):
    """Schedulers made from the configuration, or saved, have the stock schedule."""
    stock, entries = mu_of(pipe.scheduler), dict(pipe.scheduler.config)
    apply_dype(pipe, config)
    assert mu_of(pipe.scheduler) != stock
    assert dict(pipe.scheduler.config) == entries
    pipe.scheduler.save_pretrained(tmp_path)
    kind = type(pipe.scheduler)
    for scheduler in (kind.from_config(pipe.scheduler.config), kind.from_pretrained(tmp_path)):
        assert mu_of(scheduler) == stock
        assert "set_timesteps" not in vars(scheduler)
    assert "dype" not in (tmp_path / "scheduler_config.json").read_text().lower()


@pytest.mark.parametrize("remove", ["pipeline", "transformer", "block", "after a swap"])
def test_remove_leaves_nothing_on_the_scheduler(pipe, remove):
    """remove_dype restores the scheduler, also if it is given the transformer alone."""
    stock, names = mu_of(pipe.scheduler), set(vars(pipe.scheduler))
    scheduler = pipe.scheduler
    if remove == "block":
        with dype_applied(pipe, CAPPED):
            assert mu_of(scheduler) == 1.15
    else:
        apply_dype(pipe, CAPPED)
        generate_latents(pipe)
        if remove == "after a swap":
            pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        remove_dype(pipe.transformer if remove == "transformer" else pipe)
    assert mu_of(scheduler) == mu_of(pipe.scheduler) == stock
    assert set(vars(scheduler)) - {"num_inference_steps"} == names
    assert scheduler.set_timesteps.__func__ is type(scheduler).set_timesteps


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_of_a_scheduler_keeps_the_shift(pipe, duplicate):
    """A copy, as each thread has by diffusers' recipe, is set alone and restored alone."""
    apply_dype(pipe, CAPPED)
    thread_pipe = quiet(FluxPipeline(**pipe.components | {"scheduler": duplicate(pipe.scheduler)}))
    generate_latents(thread_pipe, steps=4)
    _, expected = noise_schedule(pipe.scheduler, 256, 192, 4)
    assert thread_pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(pipe.scheduler.timesteps) == 1000  # not set yet
    remove_dype(thread_pipe)
    assert mu_of(thread_pipe.scheduler) == pytest.approx(11.55, abs=0.01)


def test_shallow_copy_of_a_scheduler(pipe):
    """apply_dype and remove_dype free a shallow copy from the scheduler that it is a copy of."""
    for free in (apply_dype, remove_dype):
        pipe.scheduler = make_scheduler()
        apply_dype(pipe, CAPPED)
        pipe.scheduler.set_timesteps(2)
        twin = quiet(FluxPipeline(**pipe.components | {"scheduler": copy.copy(pipe.scheduler)}))
        assert len(noise_schedule(twin.scheduler, 512, 512, 4)[1]) == 5
        free(twin)
        twin.scheduler.set_timesteps(4, mu=1.15)
        assert (len(twin.scheduler.timesteps), len(pipe.scheduler.timesteps)) == (4, 2)


def test_set_timesteps_alone(pipe):
    """A cap needs no mu, and the signature is the stock one; other errors of diffusers stay."""
    stock = inspect.signature(pipe.scheduler.set_timesteps)
    apply_dype(pipe, CAPPED)
    scheduler = pipe.scheduler
    assert inspect.signature(scheduler.set_timesteps) == stock
    scheduler.set_timesteps(4)
    without_mu = scheduler.sigmas
    for arguments in ((4, "cpu"), (4, None, None, 11.55)):
        scheduler.set_timesteps(*arguments)
        assert torch.equal(scheduler.sigmas, without_mu)
    with pytest.raises(TypeError, match="step"):
        scheduler.set_timesteps(step=4)
    apply_dype(pipe, NUMBERS)
    with pytest.raises(ValueError, match=r"`mu` (must be passed|when)"):
        scheduler.set_timesteps(4)
    apply_dype(pipe, OWN_SCHEDULE)
    assert "set_timesteps" not in vars(scheduler)


def test_numbers_of_the_rule(pipe):
    """base_shift and max_shift give the sigmas of a scheduler with these numbers."""
    expected = make_scheduler(base_shift=0.2, max_shift=2.0)
    apply_dype(pipe, NUMBERS)
    for size in (256, 512, 1024, 1536, 4096):
        mu, sigmas = noise_schedule(pipe.scheduler, size, size, 28)
        assert mu == pytest.approx(calculate_shift((size // 16) ** 2, 256, 4096, 0.2, 2.0))
        assert sigmas == pytest.approx(noise_schedule(expected, size, size, 28)[1], abs=1e-6)
    generate_latents(pipe, steps=4)
    sigmas = noise_schedule(expected, 256, 192, 4)[1]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1e-6)
    pipe.scheduler.register_to_config(base_shift=1.15)  # as saved by earlier versions
    with pytest.raises(
        ValueError, match=r"base_shift is 0\.2, but this scheduler's mu is the same"
    ):
        apply_dype(pipe, NUMBERS)


OTHER_SCHEDULERS = {
    "UniPCMultistepScheduler": {"use_flow_sigmas": True},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True},
    "DPMSolverSinglestepScheduler": {"use_flow_sigmas": True, "lower_order_final": True},
    "DEISMultistepScheduler": {"use_flow_sigmas": True},
    "FlowMatchLCMScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"use_karras_sigmas": True, "time_shift_type": "linear"},
}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_other_schedulers(pipe, name):
    """Every scheduler that takes mu gets the cap: UniPC and others from FLUX's configuration."""
    needs("DPMSolverMultistepScheduler")
    settings = OTHER_SCHEDULERS[name] | {"use_dynamic_shifting": True}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    entries, stock = dict(pipe.scheduler.config), mu_of(pipe.scheduler)
    apply_dype(pipe, CAPPED)
    generate_latents(pipe, 512, 512, steps=4)
    mu, expected = noise_schedule(pipe.scheduler, 512, 512, 4)
    assert mu == 1.15
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    assert noise_schedule(pipe.scheduler, 4096, 4096, 4)[1] == expected
    remove_dype(pipe)
    assert mu_of(pipe.scheduler) == stock
    assert dict(pipe.scheduler.config) == entries
    assert vars(pipe.scheduler.config) == {**vars(pipe.scheduler.config), **entries}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers
def test_other_scheduler_with_a_static_schedule(pipe):
    needs("DPMSolverMultistepScheduler")
    static = {"use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**static)
    stock = noise_schedule(pipe.scheduler, 512, 512, 4)
    apply_dype(pipe, CAPPED)
    pipe.scheduler.set_timesteps(4)  # it refuses a mu
    assert (None, pipe.scheduler.sigmas.tolist()) == stock


def test_scheduler_without_mu(pipe):
    """A scheduler that cannot take the shift is refused before anything changes."""
    kind = diffusers.FlowMatchHeunDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    stock = pipe.transformer.pos_embed
    with pytest.raises(ValueError, match=r"Heun.* cannot be set, because its set_timesteps takes"):
        apply_dype(pipe, CAPPED)
    assert pipe.transformer.pos_embed is stock
    apply_dype(pipe, OWN_SCHEDULE)


def test_scheduler_with_a_replaced_method(pipe):
    """What another program put on the scheduler is called, and is there again afterwards."""
    calls, stock = [], pipe.scheduler.set_timesteps

    def count(num_inference_steps=None, device=None, sigmas=None, mu=None):
        calls.append(mu)
        stock(num_inference_steps, device, sigmas, mu)

    pipe.scheduler.set_timesteps = count
    apply_dype(pipe, CAPPED)
    apply_dype(pipe, CAPPED)
    generate_latents(pipe)
    assert calls == [1.15]
    remove_dype(pipe)
    assert pipe.scheduler.set_timesteps is count


def test_pipelines_that_share(pipe):
    """Pipelines with one transformer or one scheduler have the shift of the last apply_dype."""
    twin = quiet(FluxPipeline(**pipe.components))
    apart = quiet(FluxPipeline(**pipe.components | {"scheduler": make_scheduler()}))
    pipes = (pipe, twin, apart)

    def mu():
        return [mu_of(each.scheduler) for each in pipes]

    for each in pipes:
        apply_dype(each, CAPPED)
    assert mu() == [1.15] * 3
    apply_dype(twin, DyPEConfig(max_shift=1.5))
    assert mu() == [1.5] * 3
    apply_dype(pipe.transformer, DyPEConfig(max_shift=1.4))
    assert mu() == [1.4] * 3
    for each in pipes:
        generate_latents(each)
    duplicate = copy.deepcopy(pipe)
    remove_dype(duplicate)
    assert mu_of(duplicate.scheduler) > 11
    assert mu() == [1.4] * 3
    remove_dype(twin)
    assert min(mu()) > 11


def test_pipeline_without_a_scheduler(pipe):
    pipe.scheduler = None
    apply_dype(pipe, CAPPED)
    remove_dype(pipe)


def count_warnings(generate) -> int:
    """Call a function and return its number of `ScheduleWarning`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # which shows an equal warning once per process
        generate()
    return sum(issubclass(warning.category, ScheduleWarning) for warning in caught)


def bare_transformer(pipe):
    apply_dype(pipe.transformer, CAPPED)
    return pipe


def later_scheduler(pipe):
    apply_dype(pipe, CAPPED)
    generate_latents(pipe)
    config = {**pipe.scheduler.config, "shift_terminal": 0.02}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    return pipe


def second_pipeline(pipe):
    apply_dype(pipe, CAPPED)
    generate_latents(pipe)
    return quiet(FluxPipeline(**pipe.components | {"scheduler": make_scheduler()}))


@pytest.mark.parametrize("make", [bare_transformer, later_scheduler, second_pipeline])
def test_another_schedule_is_reported_once_per_image(pipe, make):
    """A warning comes for every stretched image whose schedule is not the one of the settings."""
    wrong = make(pipe)
    assert count_warnings(lambda: generate_latents(wrong)) == 1
    assert count_warnings(lambda: [generate_latents(wrong) for _ in range(2)]) == 2
    guidance = {"negative_prompt": "a moon", "true_cfg_scale": 3.0}
    assert count_warnings(lambda: generate_latents(wrong, **guidance)) == 1
    assert count_warnings(lambda: generate_latents(wrong, 64, 64)) == 0  # not stretched
    names = inspect.signature(FluxImg2ImgPipeline).parameters  # fewer in an old diffusers
    parts = {name: part for name, part in wrong.components.items() if name in names}
    img2img = quiet(FluxImg2ImgPipeline(**parts))
    image = {"image": Image.new("RGB", (192, 256), "teal"), "strength": 0.6}
    assert count_warnings(lambda: generate_latents(img2img, steps=5, **image)) == 1
    apply_dype(wrong.transformer, OWN_SCHEDULE)  # asks for nothing
    generate_latents(wrong)
    apply_dype(wrong, CAPPED)
    generate_latents(wrong)
    generate_latents(pipe)
    generate_latents(img2img, steps=5, **image)


def test_numbers_of_the_rule_are_reported_if_missing(pipe):
    apply_dype(pipe.transformer, NUMBERS)
    with pytest.warns(ScheduleWarning, match="shift is model, but this image's noise schedule"):
        generate_latents(pipe)


def test_flux2_with_references(pipe):
    """FLUX.2's pipeline makes new ids at every step; a warning still comes once per image."""
    build, generate = FAMILIES["flux2"]
    pipe, image = build(), Image.new("RGB", (64, 64), "teal")
    apply_dype(pipe, CAPPED)
    generate(pipe, 128, 192, steps=3, image=image)
    apply_dype(pipe.transformer, CAPPED)
    generate(pipe, 128, 192, steps=3, guidance=3.0, image=image)
    remove_dype(pipe)
    apply_dype(pipe.transformer, CAPPED)
    for _ in range(2):
        images = partial(generate, pipe, 128, 192, steps=3, guidance=3.0, image=image)
        assert count_warnings(images) == 1


def test_qwen_image_with_a_cap():
    """Qwen-Image's own schedule is the default; a cap that is missing is reported per image."""
    build, generate = FAMILIES["qwen-image"]
    pipe = build()
    images = partial(generate, pipe, 128, 192, guidance=3.0)
    for config, warnings_per_image in ((OWN_SCHEDULE, 0), (replace(CAPPED, shift="cap"), 1)):
        apply_dype(pipe, config)
        images()
        remove_dype(pipe)
        apply_dype(pipe.transformer, config)
        for _ in range(2):
            assert count_warnings(images) == warnings_per_image


def check_of(config=CAPPED) -> ScheduleCheck:
    return ScheduleCheck(config, FLUX)


def test_check_of_an_interrupted_image():
    """A schedule serves one image per denoiser, until its last step."""
    scheduler = make_scheduler()
    set_shift(scheduler, CAPPED, FLUX)
    transformer, controlnet = check_of(), check_of()
    scheduler.set_timesteps(4)
    for check in (transformer, controlnet):
        check(1.0)
    with pytest.warns(ScheduleWarning):
        transformer(1.0)  # the first image failed, and this one has another scheduler
    scheduler.set_timesteps(4)
    sample = torch.zeros(1, 4, 16)
    transformer(1.0)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    transformer(scheduler.sigmas[1].bfloat16())  # new ids within the image
    with pytest.warns(ScheduleWarning):
        transformer(1.0)  # another image, because this one was interrupted
    for timestep in scheduler.timesteps[1:]:
        scheduler.step(sample, timestep, sample)
    with pytest.warns(ScheduleWarning):
        transformer(scheduler.sigmas[-1])
    scheduler.set_timesteps(4)
    noise_schedule(scheduler, 512, 512, 4)  # begins no image
    transformer(1.0)
    check_of(OWN_SCHEDULE)(1.0)
    with pytest.warns(ScheduleWarning):
        check_of(NUMBERS)(1.0)  # the schedule has another shift


def test_check_of_a_scheduler_that_is_gone():
    scheduler = make_scheduler()
    set_shift(scheduler, CAPPED, FLUX)
    duplicate = copy.deepcopy(scheduler)
    duplicate.set_timesteps(4)
    check_of()(1.0)
    del duplicate.set_timesteps, duplicate
    with pytest.warns(ScheduleWarning):
        check_of()(1.0)


def test_check_of_a_thread():
    """A host may set a schedule in one thread, and call the denoiser in others."""
    scheduler, config = make_scheduler(), replace(CAPPED, max_shift=1.7)
    set_shift(scheduler, config, FLUX)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.sigmas[1] == pytest.approx(1 / (1 + math.exp(-1.7)))
    check, sample = check_of(config), torch.zeros(1, 4, 16)
    with ThreadPoolExecutor(1) as pool:
        for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            pool.submit(check, sigma).result()
            with pytest.warns(ScheduleWarning):
                pool.submit(check_of(NUMBERS), sigma).result()
            scheduler.step(sample, timestep, sample)
        with pytest.warns(ScheduleWarning):
            pool.submit(check, 1.0).result()  # its image is complete
