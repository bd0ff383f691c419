"""Settings: read from the environment, frozen, and identified by everything that decides a selection."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from promprune_vllm.config import Settings, is_enabled
from promprune_vllm.core.budget import Budget
from promprune_vllm.errors import SettingsError


def test_defaults() -> None:
    settings = Settings.from_environment()
    assert (settings.method, settings.method_options) == ("promprune", {})


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_METHOD", "random")
    monkeypatch.setenv("PROMPRUNE_METHOD_OPTIONS", '{"seed": 7}')
    settings = Settings.from_environment()
    assert settings.selector().seed == 7  # type: ignore[attr-defined]
    with pytest.raises(ValidationError):
        settings.method = "uniform"


def test_a_method_may_use_another_ones_calibration() -> None:
    calibration = {"promprune": {"mu": 0.57}}
    settings = Settings(method="promprune", method_options={"tau": 0.1}, allow_methods="promprune-video,fastervlm")
    assert settings.selector(calibration, "promprune-video").mu == 0.57  # type: ignore[attr-defined]
    assert settings.digest(calibration, "promprune-video") != settings.digest(method="promprune-video")
    assert settings.digest(calibration, "fastervlm") == settings.digest(method="fastervlm")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1 GB"])
def test_a_size_of_the_feature_cache_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PROMPRUNE_FEATURE_CACHE_GB", value)
    with pytest.raises(SettingsError, match="feature_cache_gb"):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("nope", "{}", "There is no method 'nope'"),
        ("random", '{"sead": 1}', "no option 'sead'"),
        ("promprune", '{"tau": 0}', "refuses"),
        ("promprune", "not json", "PROMPRUNE_METHOD_OPTIONS is a JSON object"),
        ("promprune", "[1]", "PROMPRUNE_METHOD_OPTIONS is a JSON object"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    monkeypatch: pytest.MonkeyPatch, method: str, options: str, complaint: str
) -> None:
    monkeypatch.setenv("PROMPRUNE_METHOD", method)
    monkeypatch.setenv("PROMPRUNE_METHOD_OPTIONS", options)
    with pytest.raises(SettingsError, match=complaint):
        Settings.from_environment()


def test_the_limits_of_videos_are_their_own() -> None:
    settings = Settings(budget="64", min=10, video_budget="25%", video_max=500, floor=8, out_of_range="refuse")
    policy = settings.media_policy()
    assert (policy.images.default, policy.images.minimum, policy.images.maximum) == (Budget(tokens=64), 10, None)
    assert (policy.videos.default, policy.videos.minimum, policy.videos.maximum) == (Budget.parse("25%"), 1, 500)
    assert (policy.videos.floor, policy.videos.out_of_range) == (8, "refuse")


def test_a_default_for_images_prunes_no_video() -> None:
    assert Settings(budget="64", max=100).media_policy().videos.keeps_all(None)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"VIDEO_MIN": "9", "VIDEO_MAX": "8"}, "PROMPRUNE_VIDEO_MIN, PROMPRUNE_VIDEO_MAX, .* got 9 and 8"),
        ({"VIDEO_MIN": "0"}, "PROMPRUNE_VIDEO_MIN, .* got 0 and None"),
        ({"VIDEO_BUDGET": "auto"}, "PROMPRUNE_VIDEO_BUDGET, .* cannot be the default itself"),
        (
            {"VIDEO_BUDGET": '{"per_frame": 32}'},
            'PROMPRUNE_VIDEO_BUDGET, .* got {"per_frame": 32}. Objects are for',
        ),
        ({"MIN": "9", "MAX": "8"}, "PROMPRUNE_MIN, PROMPRUNE_MAX, .* got 9 and 8"),
        ({"FLOOR": "0"}, "PROMPRUNE_FLOOR cannot be honored: floor must be at least 1 token"),
    ],
    ids=str,
)
def test_limits_that_contradict_each_other_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], complaint: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"PROMPRUNE_{name}", value)
    with pytest.raises(SettingsError, match=f"One of .*{complaint}"):
        Settings.from_environment()


@pytest.mark.parametrize("value", ["full", None, "25%"])
def test_a_default_for_videos_prunes_by_default(value: str | None) -> None:
    assert Settings(video_budget=value).prunes_by_default == (value == "25%")


def test_digest_tells_settings_apart_and_spelled_out_defaults_not() -> None:
    plain = Settings().digest()
    assert plain == Settings(method_options={"mu": 0.42}).digest()
    others = {Settings(method_options={"mu": 0.43}).digest(), Settings(method="random").digest()}
    assert len({plain, *others}) == 3


@pytest.mark.parametrize(
    ("text", "on"), [("true", True), ("1", True), ("false", False), ("0", False), ("off", False)]
)
def test_one_variable_switches_the_plugin_off_whatever_the_others_say(
    monkeypatch: pytest.MonkeyPatch, text: str, on: bool
) -> None:
    monkeypatch.setenv("PROMPRUNE_MIN", "not a number")
    monkeypatch.setenv("PROMPRUNE_ENABLED", text)
    assert is_enabled() == on


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_ENABLED", "maybe")
    with pytest.raises(SettingsError, match="PROMPRUNE_ENABLED must be true or false, got 'maybe'"):
        is_enabled()
