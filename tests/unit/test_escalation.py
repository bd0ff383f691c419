"""What a request may say about asking again, and what is in force."""

from __future__ import annotations

from fractions import Fraction

import pytest

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import Budget
from promprune_vllm.core.escalation import ESCALATE_FIELD, Escalation, EscalationRequest
from promprune_vllm.errors import BudgetError, SettingsError

FULL = Budget(share=Fraction(1))
SERVER = Escalation(below=0.8, to=Budget(tokens=128), window=4)


@pytest.mark.parametrize(
    ("value", "in_force"),
    [
        (True, SERVER),
        (False, None),
        (0.9, Escalation(0.9, SERVER.to, 4)),
        ("0.9", Escalation(0.9, SERVER.to, 4)),
        (1, Escalation(1.0, SERVER.to, 4)),
        ({"below": 0.5}, Escalation(0.5, SERVER.to, 4)),
        ({"to": "full"}, Escalation(0.8, FULL, 4)),
        ({"below": 0.9, "to": "25%"}, Escalation(0.9, Budget(share=Fraction(1, 4)), 4)),
        ({"below": None, "to": 64}, Escalation(0.8, Budget(tokens=64), 4)),
    ],
)
def test_what_a_request_leaves_out_is_the_servers(value: object, in_force: Escalation | None) -> None:
    assert EscalationRequest.parse(value).over(SERVER) == in_force


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "a probability above 0 and at most 1, got 0 (integer)"),
        (1.01, "a probability above 0 and at most 1, got 1.01 (number)"),
        ("yes", "a probability above 0 and at most 1, got 'yes' (string)"),
        ([0.9], "a probability above 0 and at most 1, got [0.9] (array)"),
        ({}, "an object with 'below', 'to' or both, got {} (object)"),
        ({"window": 4}, "an object with 'below', 'to' or both, got {'window': 4} (object)"),
        ({"below": True}, "visual_token_escalate.below must be a probability above 0 and at most 1, got True"),
        ({"to": "auto"}, "visual_token_escalate.to must be tokens, a share or \"full\", got 'auto' (string)"),
        ({"to": 0}, "visual_token_escalate.to must be an integer from 1"),
    ],
)
def test_what_it_may_not_say_is_refused_with_the_value_and_the_next_step(value: object, said: str) -> None:
    with pytest.raises(BudgetError) as caught:
        EscalationRequest.parse(value)
    assert said in str(caught.value)
    assert "omit the field" in str(caught.value)
    assert caught.value.param == ESCALATE_FIELD


def test_settings_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_environment()
    assert settings.escalate is None
    assert settings.escalation() == Escalation(0.9, FULL, 16)
    monkeypatch.setenv("PROMPRUNE_ESCALATE", "0.75")
    monkeypatch.setenv("PROMPRUNE_ESCALATE_TO", "50%")
    monkeypatch.setenv("PROMPRUNE_ESCALATE_WINDOW", "8")
    assert Settings.from_environment().escalation() == Escalation(0.75, Budget(share=Fraction(1, 2)), 8)
    assert Settings.from_environment().escalation().printed() == {"below": 0.75, "to": 0.5, "window": 8}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ESCALATE", "1.5", "less than or equal to 1"),
        ("ESCALATE", "0", "greater than 0"),
        ("ESCALATE_WINDOW", "0", "greater than or equal to 1"),
        ("ESCALATE_TO", "auto", "PROMPRUNE_ESCALATE_TO cannot be honored"),
        ("ESCALATE_TO", "0", "PROMPRUNE_ESCALATE_TO cannot be honored"),
    ],
)
def test_settings_that_cannot_be_honored(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PROMPRUNE_{name}", value)
    with pytest.raises(SettingsError, match=said):
        Settings.from_environment()
