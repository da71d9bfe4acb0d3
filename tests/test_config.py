"""DyPEConfig and its presets."""

import math

import pytest

from dype import DyPEConfig
from dype.config import DEFAULT_LAMBDA_S, preset_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "yarm"),
        ("dype", 1),
        ("dype_scale", -0.1),
        ("dype_scale", 8.1),
        ("dype_scale", math.nan),
        ("dype_scale", "2"),
        ("cutoff", 0),
        ("cutoff_width", -0.5),
        ("spectrum_exponent", 0),
        ("attention_scale", -0.1),
        ("attention_scale", 2.5),
        ("attention_path", "up"),
        ("attention_path", "rising"),
        ("dype_exponent", -1),
        ("dype_exponent", 1001),
        ("dype_start_sigma", 0),
        ("dype_start_sigma", 1.01),
        ("alpha", 0),
        ("alpha", 40),
        ("beta", 0),
        ("alpha", 10**400),
        ("base_resolution", 0),
        ("base_resolution", 1000),
        ("base_resolution", True),
        ("anisotropic", None),
        ("shift", "stock"),
        ("max_shift", math.inf),
        ("ntk_factor", 0.5),
        ("rdfc_pairs", "8;9"),
        ("rdfc_pairs", ""),
        ("rdfc_pairs", 8.5),
        ("rdfc_pairs", True),
        ("rdfc_turns", 1.5),
        ("sega_alpha", 2.5),
        ("sega_beta", 0),
        ("sega_floor", -1),
        ("sega_reference", 2),
        ("text_repeat", 0),
        ("text_repeat", 2.5),
        ("text_repeat", "all"),
    ],
)
def test_out_of_range(name, value):
    """The error names the field, the value and the accepted values."""
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected"):
        DyPEConfig(**{name: value})


def test_alpha_is_below_beta():
    with pytest.raises(ValueError, match=r"^alpha is 2, expected a number below beta, 2$"):
        DyPEConfig(alpha=2, beta=2.0)


@pytest.mark.parametrize("path", ["proportional", "tide", "sega"])
def test_other_attention_scales_need_no_number(path):
    with pytest.raises(ValueError, match=f"^attention_path is '{path}', expected no attention_sc"):
        DyPEConfig(attention_path=path, attention_scale=0.1)
    assert DyPEConfig(attention_path=path).follows_latent == (path == "sega")


def test_a_single_pair_may_be_a_number():
    assert DyPEConfig("rdfc", rdfc_pairs=9) == DyPEConfig("rdfc", rdfc_pairs="9")


def test_sega_is_static_by_default():
    assert not DyPEConfig("sega").dype
    assert DyPEConfig("dy_sega").dype
    assert DyPEConfig("sega", True) == DyPEConfig("dy_sega")
    assert DyPEConfig("sega").follows_latent
    assert not DyPEConfig("sega", attention_scale=0.1).follows_latent


def test_round_trip():
    config = DyPEConfig("ntk", dype_scale=0.0, dype_exponent=0.5, base_resolution=256, shift="cap")
    assert DyPEConfig.from_dict(config.to_dict()) == config
    assert config.lambda_s == 0  # 0 must not count as unset
    with pytest.raises(ValueError, match="unknown setting 'dype_scales', expected one of method"):
        DyPEConfig.from_dict({"dype_scales": 1})


@pytest.mark.parametrize(
    ("size", "method", "exponent"),
    [
        ((1024, 1024), "base", None),
        ((1024, 1536), "base", None),
        ((1024, 1552), "vision_yarn", 1.0),
        ((3056, 1024), "vision_yarn", 1.0),
        ((1024, 3072), "vision_yarn", 2.0),
        ((4096, 4096), "vision_yarn", 2.0),
    ],
)
def test_auto(size, method, exponent):
    """The preset `auto` depends on the size relative to the base resolution."""
    settings = preset_settings("auto", *size, 1024)
    assert settings["method"] == method
    assert settings.get("dype_exponent") == exponent
    assert settings.get("dype_scale") == (None if method == "base" else 2.0)


def test_presets_off_and_4k():
    assert preset_settings("off", 4096, 4096, 1024) == {"method": "base", "dype": False}
    four_k = DyPEConfig(**preset_settings("4k", 512, 512, 1024))
    assert four_k == DyPEConfig("vision_yarn", True, 2.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="preset is '8k', expected one of off, auto, 4k"):
        preset_settings("8k", 512, 512, 1024)


def test_names_with_dype():
    """A name as in tables and files, `dy_yarn`, is yarn with DyPE; `base` has one form."""
    assert DyPEConfig("dy_yarn") == DyPEConfig("yarn")
    assert DyPEConfig("dy_yarn").name == "dy_yarn"
    for method in DEFAULT_LAMBDA_S:
        for dynamic in (True, False):
            config = DyPEConfig(method, dype=dynamic)
            assert DyPEConfig(config.name, dype=dynamic).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="dype is False, expected True with 'dy_yarn'"):
        DyPEConfig("dy_yarn", dype=False)
    with pytest.raises(ValueError, match="method is 'dy_base', expected one of base, pi"):
        DyPEConfig("dy_base")
