"""Defaults, methods, and errors that name the value, the rule and the way out."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.carry import policy_of
from statekv.cache.policies import Candidates, Policy
from statekv.config import (
    BYTES,
    CARRIES,
    METHODS,
    RECALLS,
    SETTINGS,
    SOURCES,
    Config,
    Setting,
    bytes_of,
    check_source,
    schema,
    told,
)
from statekv.config.spelling import check_name, load_named, spell
from statekv.errors import ConfigError

HERE = "tests.config.test_config"


class Whatever(Policy):
    """Goes by nothing."""

    def score(self, candidates: Candidates) -> torch.Tensor:
        return candidates.token_ids.double()


CAPS = [name for name, setting in SETTINGS.items() if setting.kind is BYTES]


def known(name: str) -> tuple[str, ...]:
    return SETTINGS[name].kind.known


def test_the_defaults_are_the_paper() -> None:
    config = Config()
    assert config.method == "statekv"
    assert (config.carry, config.recall, config.budget, config.pin_prefix) == ("attention", "all", 4096, False)
    assert config.score_every == 1
    assert not any((config.decay, config.value_norms, config.layer_slope, config.pin_newest, config.coverage))
    assert config == Config.of() == Config.of("statekv")


def test_is_frozen_and_can_be_a_key() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 1  # type: ignore[misc]
    assert len({config, Config(), Config(budget=7)}) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_it_sets(method: str) -> None:
    budget = Config.of(method).fitting(budget=99)
    config, settings = Config.of(method, **budget), {**METHODS[method], **budget}
    assert config == Config(**settings)
    assert config.method == method


def test_methods_are_different_and_set_both_dials() -> None:
    assert len({Config.of(method) for method in METHODS}) == len(METHODS)
    assert all(
        settings["carry"] in {*CARRIES, "all"} and settings["recall"] in RECALLS for settings in METHODS.values()
    )


def test_a_number_does_not_change_a_methods_name() -> None:
    assert Config.of("uniform", max_frames=9).method == "uniform"
    assert Config.of("full", max_frames=64).method == "full"
    assert Config.of("rekv", retrieve=9, budget=8).method == "rekv"
    assert Config.of("rekv", pin_prefix=False).method == "recent+retrieve"
    assert Config.of("statekv", pin_prefix=True).method == "statekv"


def test_other_dials_have_both_names() -> None:
    assert Config(carry="random", recall="recent").method == "random+recent"


def test_a_dial_set_by_hand_wins() -> None:
    assert Config.of("streaming_llm", recall="all").method == "sink_recent+all"


def test_with_changes_only_what_it_names() -> None:
    config = Config(budget=10, fps=None, seed=3, carry="recent")
    changed = config.with_(budget=20)
    assert changed == Config(budget=20, fps=None, seed=3, carry="recent")
    assert config.budget == 10
    assert config.with_() == config


def test_none_takes_a_limit_away() -> None:
    config = Config(budget=10, max_frames=5, horizon=9, fps=2.0)
    assert config.with_(max_frames=None, horizon=None, fps=None) == Config(budget=10, fps=None)


def test_another_method_replaces_both_dials_and_nothing_else() -> None:
    config = Config(carry="recent", recall="recent", budget=10, seed=4)
    assert config.with_("uniform") == Config.of("uniform", seed=4)
    assert config.with_("statekv") == Config(budget=10, seed=4)
    assert config.with_(None, budget=11).carry == "recent"


def test_the_method_is_what_it_was_made_with() -> None:
    """Not what its dials would be called by somebody who has not made it."""
    config = Config.of("full", uniform=True, max_frames=9)
    assert config.method == "full"
    assert Config(carry="all", uniform=True, max_frames=9).method == "uniform"
    assert config == Config(carry="all", uniform=True, max_frames=9)  # who made it changes nothing about it
    for kept in (config.with_(seed=3), dataclasses.replace(config, seed=3), copy.deepcopy(config)):
        assert kept.method == "full"


@pytest.mark.parametrize("config", [Config(), Config.of("full", uniform=True, max_frames=9), Config(recall="recent")])
def test_it_is_made_again_from_any_other(config: Config) -> None:
    for other in (Config.of("rekv", retrieve=3), Config(memory=5, fps=None)):
        found = other.with_(**config.opening)
        assert (found, found.method) == (config, config.method)


@pytest.mark.parametrize("changed", [{"carry": "recent"}, {"recall": "sink_recent"}], ids=str)
def test_another_dial_takes_the_name_away(changed: dict[str, Any]) -> None:
    expected = Config(**{"carry": "attention", **changed}).method
    assert Config.of("statekv", **changed).method == expected != "statekv"
    assert dataclasses.replace(Config(), **changed).method == expected


@pytest.mark.parametrize("config", [Config(), Config.of("full", uniform=True, max_frames=9), Config(recall="recent")])
def test_what_is_written_down_comes_back(config: Config) -> None:
    facts = json.loads(json.dumps(config.facts))
    found = Config.of_facts(facts)
    assert (found, found.method) == (config, config.method)
    del facts["method"]  # as 0.1 wrote it
    assert Config.of_facts(facts) == config


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (Config(), "Config.of('statekv')"),
        (Config.of("rekv", budget=99), "Config.of('rekv', budget=99)"),
        (Config(carry="random", recall="recent"), "Config(carry='random', recall='recent')"),
        (Config.of("uniform"), "Config.of('uniform')"),
        (Config.of("uniform", max_frames=None, uniform=False), "Config.of('full')"),
        (Config(memory="1GiB", fps=None), "Config.of('statekv', fps=None, memory=1073741824)"),
    ],
    ids=str,
)
def test_it_shows_what_is_not_as_it_would_be_anyway(config: Config, shown: str) -> None:
    assert repr(config) == shown
    again = eval(shown)
    assert (again, again.method) == (config, config.method)


def test_what_the_former_method_alone_had_a_use_for_goes_with_it() -> None:
    """A session may have another method than its engine, whose settings are those of sessions that say nothing."""
    engine = Config.of("statekv_retrieve", budget=9, retrieve=5, decay=0.5, kernel="naive", fps=3.0)
    assert engine.with_("full") == Config.of("full", fps=3.0)
    assert engine.with_("recency_window") == Config.of("recency_window", budget=9, fps=3.0)
    assert engine.with_("rekv") == Config.of("rekv", budget=9, retrieve=5, fps=3.0)
    assert engine.with_(carry="all") == Config(carry="all", recall="retrieve", retrieve=5, fps=3.0)
    with pytest.raises(ConfigError, match="budget is 9 with carry 'all'"):
        engine.with_("full", budget=9)
    with pytest.raises(ConfigError, match="memory is 1"):  # a promise is not dropped
        Config(memory=1).with_("full")


def test_what_version_0_1_saved_is_read() -> None:
    """It saved every setting, whether it meant something or not."""
    facts = Config.of("full").settings | {"budget": 40, "retrieve": 3, "pin_prefix": True}
    assert Config.of_facts(facts) == Config.of("full")


@pytest.mark.parametrize("carry", ["recent", "recent()", " key_norm()", Whatever()], ids=str)
def test_dials_of_attention_need_it(carry: Any) -> None:
    for name, value in {"decay": 0.5, "score_every": 2, "kernel": "naive"}.items():
        with pytest.raises(ConfigError, match=f"{name} is {value!r} with carry .*, but means something only with"):
            Config(**{"carry": carry, name: value})


def test_a_policy_that_is_not_known_is_asked_once_it_is_loaded() -> None:
    config = Config(carry=f"{HERE}:Whatever", kernel="naive")
    with pytest.raises(
        ConfigError, match=r"kernel is 'naive' with carry 'tests.config.test_config:Whatever', but means"
    ):
        policy_of(config)
    assert policy_of(Config(carry=f"{HERE}:Whatever")).needs_attention is False


def test_a_policy_keeps_its_own_sinks_within_the_budget() -> None:
    with pytest.raises(ConfigError, match=r"carry 'random' keeps 4 sinks, which fill a budget of 4 \(raise budget"):
        policy_of(Config(carry="random", budget=4))
    policy_of(Config(carry="random", budget=4, sinks=3))
    policy_of(Config(carry="random", budget=5))


def test_a_policy_names_the_method() -> None:
    assert Config(carry=Whatever()).method == f"{HERE}:Whatever()+all"
    assert Config(carry="key_norm").method == "key_norm+all"


def test_settings_for_several_methods_are_given_to_those_that_have_a_use_for_them() -> None:
    given = {"budget": 9, "retrieve": 5, "kernel": "naive", "memory": "1GiB", "bits": 4, "seed": 3}
    assert Config.of("statekv").fitting(**given) == {name: given[name] for name in given if name != "retrieve"}
    assert Config.of("rekv").fitting(**given) == {name: given[name] for name in given if name != "kernel"}
    assert Config.of("full").fitting(budget=9, bits=4, seed=3) == {"seed": 3}


@pytest.mark.parametrize("source", SOURCES)
def test_what_means_nothing_with_a_source_is_refused(source: str) -> None:
    for name, value in {"fps": 2.0, "prefetch": 3, "max_lag_seconds": 5.0, "reconnect_seconds": 0, "seed": 3}.items():
        check_source({name: SETTINGS[name].default}, source)
        if source in SETTINGS[name].sources:
            check_source({name: value}, source)
            continue
        with pytest.raises(ConfigError) as caught:
            check_source({name: value}, source)
        assert f"{name} is {value!r} with {SOURCES[source]}, but means something only with" in str(caught.value)
        assert caught.value.hint == f"leave {name} out"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_declared(setting: Setting) -> None:
    assert getattr(Config(), setting.name) == setting.default
    assert setting.help[0].isupper()
    assert setting.help.endswith(".")
    assert (setting.default is None) <= setting.optional
    assert setting.scope.planned <= setting.scope.on_restore
    assert f"{setting.name}: {setting.help}" in (Config.__doc__ or "")


def test_the_schema_is_that_of_the_declarations() -> None:
    found = json.loads(json.dumps(schema()))
    assert found["properties"].keys() == SETTINGS.keys()
    assert found["properties"]["coverage"] | {"description": ""} == {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.0,
        "description": "",
    }
    assert found["properties"]["max_frames"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    assert found["properties"]["recall"]["enum"] == list(RECALLS)
    for name, setting in SETTINGS.items():
        assert found["properties"][name]["default"] == setting.default
        assert setting.help in found["properties"][name]["description"]


def test_errors_can_be_spelled_as_the_command_line_does() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(max_frames=0)
    assert str(caught.value).startswith("max_frames is 0, but must be")
    told = caught.value.spelled(lambda name: SETTINGS[name].option)
    assert str(told) == str(caught.value).replace("max_frames", "--max-frames")


@pytest.mark.parametrize("former", METHODS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_nothing_to_the_next(former: str, method: str) -> None:
    settings = {"retrieve": 9, "sinks": 1, "kernel": "naive", "seed": 3}
    of_both = {**Config.of(method).fitting(**Config.of(former).fitting(**settings))}
    assert Config.of(former, **Config.of(former).fitting(**settings)).with_(method) == Config.of(method, **of_both)


def test_what_was_set_by_hand_stays() -> None:
    assert Config.of("uniform", max_frames=9).with_("statekv") == Config(max_frames=9)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"carry": "best"}, ["carry 'best'", *CARRIES]),
        ({"recall": "best"}, ["recall 'best'", *RECALLS]),
        ({"retrieve_positions": "new"}, ["retrieve_positions 'new'", *known("retrieve_positions")]),
        ({"retrieve": 0}, ["retrieve is 0", "at least 1"]),
        ({"retrieve_newest": -1}, ["retrieve_newest is -1", "at least 0"]),
        ({"retrieve_carried": 1}, ["retrieve_carried is 1", "True or False"]),
        ({"last_frames": 0}, ["last_frames is 0", "at least 1"]),
        ({"uniform": "yes"}, ["uniform is 'yes'", "True or False"]),
        ({"uniform": True}, ["max_frames is None", "uniform", "give max_frames"]),
        ({"recall": "last_frames"}, ["carry is 'attention'", "recall 'last_frames'", "set carry to 'all'"]),
        (
            {"recall": "retrieve", "carry": "all", "retrieve_carried": True},
            ["retrieve_carried is True", "carry 'all'", "set recall to 'all'"],
        ),
        (
            {"recall": "retrieve", "retrieve_carried": True, "retrieve_positions": "reindex"},
            ["retrieve_carried is True", "'reindex'", "set retrieve_positions to 'keep'"],
        ),
        ({"layout": "chat"}, ["layout 'chat'", *known("layout")]),
        ({"kernel": "cuda"}, ["kernel 'cuda'", *known("kernel")]),
        ({"budget": 0}, ["budget is 0", "at least 1"]),
        ({"budget": -5}, ["budget is -5", "at least 1"]),
        ({"budget": 2.5}, ["budget is 2.5", "whole number"]),
        ({"budget": "4096"}, ["budget is '4096'", "whole number"]),
        ({"budget": True}, ["budget is True", "whole number"]),
        ({"max_frames": 0}, ["max_frames is 0", "at least 1"]),
        ({"score_every": 0}, ["score_every is 0", "at least 1"]),
        ({"vision_batch": 0}, ["vision_batch is 0", "at least 1"]),
        ({"graph": "off"}, ["graph is 'off'", "True or False"]),
        ({"horizon": 0}, ["horizon is 0", "at least 1"]),
        ({"on_horizon": "wrap"}, ["on_horizon 'wrap'", *known("on_horizon")]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
        ({"prefetch": 0}, ["prefetch is 0", "at least 1"]),
        ({"sinks": -1}, ["sinks is -1", "at least 0"]),
        ({"seed": -1}, ["seed is -1", "at least 0"]),
        ({"decay": -0.1}, ["decay is -0.1", "from 0 to 1"]),
        ({"decay": 1.5}, ["decay is 1.5", "from 0 to 1"]),
        ({"decay": float("nan")}, ["decay is nan", "from 0 to 1"]),
        ({"decay": True}, ["decay is True", "a number"]),
        ({"coverage": 2}, ["coverage is 2", "from 0 to 1"]),
        ({"layer_slope": -1.2}, ["layer_slope is -1.2", "from -1 to 1"]),
        ({"layer_slope": "0"}, ["layer_slope is '0'", "a number"]),
        ({"layer_slope": 1.0}, ["layer_slope is 1.0", "budget of 4096", "raise budget"]),
        ({"layer_slope": -0.9, "budget": 9}, ["layer_slope is -0.9", "budget of 9", "without a key"]),
        ({"pin_newest": -1}, ["pin_newest is -1", "at least 0"]),
        ({"value_norms": 1}, ["value_norms is 1", "True or False"]),
        ({"carry": "recent", "decay": 0.5}, ["decay is 0.5", "carry 'recent'", "set carry to 'attention'"]),
        ({"carry": "all", "coverage": 0.5}, ["coverage is 0.5", "carry 'all'", "leave coverage out"]),
        ({"carry": "all", "layer_slope": 0.5}, ["layer_slope is 0.5", "carry 'all'"]),
        ({"carry": "all", "pin_newest": 2}, ["pin_newest is 2", "carry 'all'"]),
        ({"budget": 4, "sinks": 4}, ["sinks is 4", "budget of 4", "lower sinks"]),
        ({"carry": "all", "value_norms": True}, ["value_norms is True", "carry 'all'"]),
        ({"fps": 0}, ["fps is 0", "above 0"]),
        ({"fps": -1.5}, ["fps is -1.5", "above 0"]),
        ({"fps": float("nan")}, ["fps is nan", "above 0"]),
        ({"fps": "2"}, ["fps is '2'"]),
        ({"carry": "sink_recent", "budget": 4}, ["sinks is 4", "budget of 4", "raise budget or lower sinks"]),
        ({"recall": "sink_recent", "budget": 9, "sinks": 10}, ["sinks is 10", "budget of 9"]),
        ({"memory": "8 apples"}, ["memory is '8 apples'", "amount of memory", "8GiB"]),
        ({"memory": 0}, ["memory is 0", "amount of memory"]),
        ({"memory": "1GiB", "host_memory": -1}, ["host_memory is -1", "amount of memory"]),
        ({"memory": "1GiB", "disk": True}, ["disk is True", "amount of memory"]),
        ({"memory": "1GiB", "bits": 3}, ["bits is 3", "8, 4 or 2"]),
        ({"memory": "1GiB", "bits": "4"}, ["bits is '4'", "8, 4 or 2"]),
        ({"memory": "1GiB", "bits": True}, ["bits is True", "8, 4 or 2"]),
        ({"bits": 4}, ["bits is 4", "without memory", "leave bits out"]),
        ({"host_memory": "1KiB"}, ["host_memory is 1.0 KiB", "without memory", "give memory"]),
        ({"disk": "1KiB", "disk_folder": "x"}, ["disk is 1.0 KiB", "without memory"]),
        ({"memory": "1GiB", "disk_folder": "x"}, ["disk_folder is 'x'", "without disk", "give disk"]),
        ({"carry": "all", "budget": 9}, ["budget is 9 with carry 'all'", "leaves keys behind", "leave budget out"]),
        ({"carry": "all", "recall": "recent", "sinks": 3}, ["sinks is 3 with carry 'all'"]),
        ({"carry": "all", "pin_prefix": True}, ["pin_prefix is True with carry 'all'"]),
        ({"carry": "recent", "kernel": "naive"}, ["kernel is 'naive' with carry 'recent'", "set carry to 'attention'"]),
        ({"carry": "random", "score_every": 2}, ["score_every is 2 with carry 'random'"]),
        ({"retrieve": 9}, ["retrieve is 9 with recall 'all'", "set recall to 'retrieve', or leave retrieve out"]),
        ({"retrieve_newest": 1, "recall": "recent"}, ["retrieve_newest is 1 with recall 'recent'"]),
        ({"retrieve_carried": True}, ["retrieve_carried is True with recall 'all'"]),
        ({"retrieve_positions": "reindex"}, ["retrieve_positions is 'reindex' with recall 'all'"]),
        ({"last_frames": 9}, ["last_frames is 9 with recall 'all'", "set recall to 'last_frames'"]),
        ({"memory": 512, "carry": "all"}, ["memory is 512", "carry 'all'", "leave memory out"]),
        ({"memory": 512, "recall": "recent", "disk": 5}, ["disk is 5 B", "recall 'recent'", "leave disk out"]),
        ({"memory": 512, "recall": "sink_recent", "bits": 4}, ["bits is 4", "recall 'sink_recent'"]),
        ({"memory": 512, "recall": "recent", "host_memory": 9}, ["host_memory is 9 B", "set recall to 'all'"]),
    ],
    ids=str,
)
def test_errors_name_value_rule_and_way_out(settings: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**settings)
    text = str(caught.value)
    assert all(part in text for part in named)
    assert "\n" not in text
    assert caught.value.hint
    with pytest.raises(ConfigError):  # the same rules hold on the other ways in
        Config().with_(**settings)


def test_a_wrong_type_is_not_told_to_be_larger() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(budget=4096.0)  # type: ignore[arg-type]
    assert caught.value.hint != "raise budget"


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 1, "max_frames": 1, "horizon": 1, "max_new_tokens": 1, "prefetch": 1, "sinks": 0, "seed": 0},
        {"fps": None, "max_frames": None, "horizon": None, "on_horizon": None},
        {"on_horizon": "compact", "carry": "all"},
        {"fps": 29.97},
        {"budget": 5, "sinks": 4},
        {"budget": 4, "sinks": 3, "carry": "sink_recent"},
        {"retrieve": 1, "retrieve_newest": 0, "recall": "retrieve", "retrieve_carried": True},
        {"last_frames": 1, "recall": "last_frames", "carry": "all"},
        {"retrieve": 64, "last_frames": 4, "sinks": SETTINGS["sinks"].default},  # as if they had not been given
        {"budget": 9, "recall": "recent", "carry": "all"},
        {"budget": 9, "sinks": 3, "recall": "sink_recent", "carry": "all"},
        {"uniform": True, "max_frames": 1},
        {"decay": 1, "coverage": 1.0, "layer_slope": -0.99, "pin_newest": 0},
        {"decay": 0, "coverage": 0.0, "layer_slope": 0.5, "budget": 2, "value_norms": True},
        {"memory": 1, "host_memory": 1, "disk": 1, "disk_folder": "x", "bits": 2},
        {"memory": 2**40, "recall": "retrieve", "carry": "random"},
        {"memory": None, "host_memory": None, "disk": None, "disk_folder": None, "bits": None, "carry": "all"},
        {"carry": "all", "decay": 0.0, "coverage": 0, "layer_slope": 0.0, "pin_newest": 0, "value_norms": False},
    ],
    ids=str,
)
def test_the_edges_are_allowed(settings: dict[str, Any]) -> None:
    config = Config(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


@pytest.mark.parametrize("name", CAPS)
def test_caps_are_counted_however_they_are_written(name: str) -> None:
    """So that the same cap is the same configuration."""
    caps: dict[str, Any] = {"memory": "1GiB", name: "1.5 MiB"}
    config = Config(**caps)
    assert getattr(config, name) == 3 * 2**19
    assert config == Config(**{**caps, name: 3 * 2**19})
    assert len({config, config.with_(**{name: "1536 KiB"})}) == 1


def test_by_default_nothing_is_capped() -> None:
    config = Config()
    assert [getattr(config, name) for name in (*CAPS, "disk_folder", "bits")] == [None] * 5


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.of("stateKV")
    assert "method 'stateKV'" in str(caught.value)
    assert all(method in caught.value.hint for method in METHODS)


def test_an_unknown_setting_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.of(bugdet=3)
    assert "'bugdet'" in str(caught.value)
    assert all(name in caught.value.hint for name in SETTINGS)


def test_check_name_returns_for_known_names() -> None:
    check_name("letter", "b", ("a", "b"))
    with pytest.raises(ConfigError, match=r"^unknown letter 'c' \(known: a, b\)$"):
        check_name("letter", "c", ["a", "b"])


@pytest.mark.parametrize(
    ("amount", "count"),
    [
        (1, 1),
        ("12", 12),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("500MB", 500_000_000),
        ("2TB", 2 * 10**12),
        ("7 KiB", 7168),
        ("9B", 9),
    ],
    ids=str,
)
def test_amounts_are_counted(amount: Any, count: int) -> None:
    assert bytes_of("memory", amount) == count


@pytest.mark.parametrize("amount", [0, -1, True, 1.5, "", "GiB", "8 apples", "-3GiB", "0", "1e3", "8G", [8]], ids=str)
def test_others_are_refused_in_one_line(amount: Any) -> None:
    with pytest.raises(ConfigError, match=r"disk is .* must be an amount of memory .*8GiB") as found:
        bytes_of("disk", amount)
    assert "\n" not in str(found.value)


def test_counts_are_told_in_a_unit_that_suits_them() -> None:
    counts = (5, 2048, 3 * 2**19, 8 * 2**30, 5 * 2**40)
    assert [told(count) for count in counts] == ["5 B", "2.0 KiB", "1.5 MiB", "8.0 GiB", "5.0 TiB"]


class Method:
    """What `load_named` is asked for in these tests."""


@dataclasses.dataclass(frozen=True)
class Every(Method):
    step: int
    name: str = "x"

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError("step must be\nat least 1")
        if self.step == 13:
            raise KeyError("thirteen")


class Forgetful(Method):
    def __init__(self, step: int = 1) -> None:
        self.kept = step


@dataclasses.dataclass(frozen=True)
class Holding(Method):
    step: object


TABLE: dict[str, str | type[Any]] = {"every": f"{HERE}:Every", "bare": Method}


@pytest.mark.parametrize("spelling", ["every(step=3)", f"{HERE}:Every(step=3)", " every ( step = 3 ) ", Every(3)])
def test_a_method_is_found_by_name_by_place_or_as_it_is(spelling: object) -> None:
    assert load_named(spelling, TABLE, "method", Method) == Every(3)


def test_a_method_is_spelled_so_that_it_can_be_found_again() -> None:
    assert spell(Every(3, "a(b)'"), TABLE) == """every(step=3, name="a(b)'")"""
    assert spell(Every(3), {}) == f"{HERE}:Every(step=3, name='x')"
    assert type(load_named("bare", TABLE, "method", Method)) is Method
    for table in (TABLE, {}):
        assert load_named(spell(Every(3, "a(b)'"), table), table, "method", Method) == Every(3, "a(b)'")


@pytest.mark.parametrize(
    ("spelling", "named"),
    [
        ("", ["method is ''", "cannot be read", "package.module:Class"]),
        ("every(3)", ["cannot be read"]),
        ("every(step=3", ["cannot be read"]),
        ("every(step=open('x'))", ["cannot be read"]),
        ("every(**{})(step=1)", ["cannot be read"]),
        ("every(step=1)(step=2)", ["cannot be read"]),
        ("other", ["unknown method 'other'", "every, bare, package.module:Class"]),
        ("every", ["missing", "'step'", "parameters: step, name"]),
        ("every(step=1, far=2)", ["'far'", "parameters: step, name"]),
        ("every(step=0)", ["Every refuses: step must be at least 1"]),
        ("every(step='a')", ["Every refuses"]),
        ("every(step=13)", ["Every refuses: KeyError: 'thirteen'"]),
        ("nowhere.at_all:Every", ["no module nowhere", "PYTHONPATH"]),
        (f"{HERE}:Never", [f"{HERE} has no Never"]),
        ("subprocess:Popen(args='true')", ["which is no Method", f"{HERE}.Method"]),
        ("os:system(command='true')", ["which is no Method"]),
        (7, ["method is 7", "must be a Method"]),
        (Every, ["must be a Method", "an instance"]),
    ],
)
def test_a_method_that_cannot_be_had_is_refused_in_one_line(spelling: object, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_named(spelling, TABLE, "method", Method)
    assert all(part in str(caught.value) for part in named), str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_module_that_does_not_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_method.py").write_text("raise RuntimeError('out of\\nluck')")
    (tmp_path / "needy_method.py").write_text("import nowhere.at_all")
    with pytest.raises(ConfigError, match="broken_method cannot be imported: RuntimeError: out of luck"):
        load_named("broken_method:Method", {}, "method", Method)
    with pytest.raises(ConfigError, match="needy_method needs nowhere"):
        load_named("needy_method:Method", {}, "method", Method)


def test_a_method_without_a_hash_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Holding has no hash, .*'list' \(.* tuples in place of lists\)$"):
        Config(carry=Holding([1]))


@pytest.mark.parametrize("method", [Forgetful(), Holding(torch.zeros(2))])
def test_a_method_that_could_not_be_written_down_is_refused(method: Method) -> None:
    with pytest.raises(ConfigError, match="does not keep its parameter 'step'"):
        spell(method, TABLE)
