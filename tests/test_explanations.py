import re

import pytest

from agent.cli import VERBS, main
from agent.config import keys
from agent.errors import AgentError, Owner, all_errors
from agent.explanations import EXPLANATIONS, ROLES

ALL = sorted(all_errors().values(), key=lambda cls: cls.__name__)
SECTIONS = {key.partition(".")[0] for key in keys() if "." in key}
FOREIGN_OPTIONS = {"--alias", "--served-model-name"}  # llama-server's, vLLM's


def texts(cls: type[AgentError]) -> list[str]:
    explanation = EXPLANATIONS[cls]
    return [explanation.happened, *explanation.check, explanation.withheld]


def typed_words(cls: type[AgentError]) -> list[str]:
    """What stands in backquotes."""
    return [word for text in texts(cls) for word in re.findall(r"`([^`]+)`", text)]


def test_every_concrete_class_has_one_and_every_owner_a_role() -> None:
    assert EXPLANATIONS.keys() == set(ALL)
    assert ROLES.keys() == set(Owner)


def test_no_class_shares_a_text_with_another() -> None:
    seen = [text for cls in ALL for text in texts(cls)]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_explanation_is_whole_sentences_of_a_readable_length(cls: type[AgentError]) -> None:
    explanation = EXPLANATIONS[cls]
    assert 2 <= len(re.findall(r"[.?](?: |\Z)", explanation.happened)) <= 4
    assert 2 <= len(explanation.check) <= 5
    for text in texts(cls):
        assert 40 <= len(text) <= 420
        assert text == " ".join(text.split()), "one paragraph; the command wraps it"
        assert text.endswith((".", "?"))
        assert text.count("`") % 2 == 0


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_configuration_keys_that_are_named_exist(cls: type[AgentError]) -> None:
    words = [word for word in typed_words(cls) if re.match(r"[a-z]+\.[a-z_]+\Z", word)]
    assert [word for word in words if word.partition(".")[0] in SECTIONS and word not in keys()] == []
    bare = " ".join(re.sub(r"`[^`]+`", "", text) for text in texts(cls))
    assert [key for key in keys() if "." in key and key in bare] == [], "keys stand in backquotes"


def test_many_explanations_name_a_key() -> None:
    """The test above looks at something."""
    assert len({cls for cls in ALL if set(typed_words(cls)) & set(keys())}) > len(ALL) / 2


def test_verbs_and_options_that_are_named_exist(capsys: pytest.CaptureFixture[str]) -> None:
    help_of = {}
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        help_of[verb] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for cls in ALL:
        for word in typed_words(cls):
            first, *rest = word.split()
            if first == "keyturn" and not rest[0].startswith("--"):
                assert rest[0] in VERBS, word
                assert {option for option in rest if option.startswith("--")} <= help_of[rest[0]], word
            elif first.startswith("--") and first not in FOREIGN_OPTIONS:
                assert any(first in options for options in help_of.values()), word
