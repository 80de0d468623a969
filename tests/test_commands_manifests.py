"""Strict YAML, and where a setting stands in it."""

import pytest

from agent.commands.manifests import (
    MAX_DEPTH,
    MAX_DOCUMENTS,
    Container,
    MalformedYamlError,
    Setting,
    find,
    parse_documents,
    pods,
)


def one(text: str) -> Setting:
    (document,) = parse_documents(text.encode())
    return document


def container(text: str) -> Container:
    return Container(one(text), False)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &x 1\nb: *x", 1),
        ("a: 1\nb: *x", 2),
        ("a: &x {b: 1}", 1),
        ("a: 1\nb: !!python/object:os.system {}", 2),
        ("a: !!str 1", 1),
        ("a: 1\na: 2", 1),
        ("x:\n  a: 1\n  'a': 2", 2),
        ("1: a", 1),
        ("on: a", 1),
        ("? [a]\n: b", 1),
        ("a: [", 1),
        ("a: 1\n\tb: 2", 2),
        ("a: 'b", 1),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 1),
        ("---\na: 1\n" * (MAX_DOCUMENTS + 1), None),
        ("- 1\n" * 200_000, None),
        ("a: " + "9" * 5000, None),
        ("a: \x01", None),
        ("%YAML 3.0\n---\na: 1", None),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(text: str, line: int | None) -> None:
    with pytest.raises(MalformedYamlError) as caught:
        parse_documents(text.encode())
    if line is not None:
        assert caught.value.line == line


def test_what_is_not_utf8_is_refused() -> None:
    with pytest.raises(MalformedYamlError):
        parse_documents(b"a: \xff")


def test_documents_are_plain_data_and_empty_ones_are_left_out() -> None:
    found = parse_documents(b"---\na: 2026-01-01\nb: 0400\nc: [yes, null, 1.5, '1', <<]\n---\n---\n{x: {}}\n")
    assert [setting.value for setting in found] == [
        {"a": "2026-01-01", "b": 0o400, "c": [True, None, 1.5, "1", "<<"]},
        {"x": {}},
    ]
    assert parse_documents(b"") == []


def test_a_setting_knows_where_it_stands_and_where_it_would() -> None:
    document = one("a: [{b: x}, 1]\nc: {d/e: 1}")
    assert document.at("a").items()[0].at("b") == Setting("x", "a[0].b")
    assert document.at("a").items()[1].at("b", "z") == Setting(None, "a[1].b.z")
    assert document.at("c", "d/e") == Setting(1, 'c["d/e"]')
    assert document.at("c").entries() == [("d/e", Setting(1, 'c["d/e"]'))]
    assert document.at("\x1b" * 200).path == '["' + "\\u001b" * 128 + '"]'
    assert (document.at("q").items(), document.at("q").entries()) == ([], [])


def test_a_wrong_type_is_nothing() -> None:
    document = one("a: [1]\nb: true\nc: '1'")
    assert [document.at(key).number for key in "abc"] == [None, None, None]
    assert [document.at(key).text for key in "abc"] == [None, None, "1"]


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("1", 1),
        ("'1'", 1),
        ("1Gi", 1 << 30),
        ("1.5Gi", 3 << 29),
        ("2k", 2000),
        ("1G", 10**9),
        ("1500m", 1),
        ("0", 0),
        ("-1", None),
        ("1gi", None),
        ("true", None),
        ("1.5", None),
        ("'9999999999999999999'", None),
        ("[1]", None),
        ("''", None),
        ("'1 Gi'", None),
    ],
)
def test_quantities(text: str, quantity: int | None) -> None:
    assert one(f"a: {text}").at("a").quantity == quantity


def test_a_container_executes_keyturn_or_something_else() -> None:
    assert container("command: [/opt/keyturn/keyturn, run]").verb == "run"
    assert container("command: [keyturn]\nargs: [load, --out, /x]").verb == "load"
    for other in ("command: [sh, -c, keyturn run]", "command: [keyturn]", "args: [1, 2]", "command: keyturn run"):
        assert container(other).verb is None


def test_options_in_both_spellings() -> None:
    given = container("command: [keyturn, run, --a, x, --b=y, --c]")
    assert given.option("--a") == Setting("x", "command[3]")
    assert given.option("--b") == Setting("y", "command[4]")
    assert given.option("--c") == Setting("", "command[5]")
    assert given.option("--d") is None
    assert container("command: [keyturn, exec, --, vllm, --a=x]").option("--a") is None


def test_the_nearest_mount_counts() -> None:
    given = container("volumeMounts: [{mountPath: /a}, {mountPath: /a/b/}, {mountPath: /}, {}]")
    assert [mount and mount.path for mount in map(given.mount, ("/a/b/c", "/a/bc", "/a", "/x", ""))] == [
        "volumeMounts[1]",
        "volumeMounts[0]",
        "volumeMounts[0]",
        None,
        None,
    ]


def test_an_init_container_that_goes_on_beside_the_others_is_none() -> None:
    (pod,) = pods(parse_documents(b"{kind: Pod, spec: {initContainers: [{restartPolicy: Always}, {}], containers: [{}]}}"))
    assert [each.init for each in pod.containers] == [False, True, False]


def test_the_items_of_a_list_stand_for_it() -> None:
    found = parse_documents(b"kind: List\nitems: [{kind: Pod}, {kind: ConfigMap}]\n---\nkind: Service\n---\nkind: PodList\n")
    assert [(item.at("kind").text, item.path) for item in found] == [
        ("Pod", "items[0]"),
        ("ConfigMap", "items[1]"),
        ("Service", ""),
    ]
    (pod,) = pods(found)
    assert pod.spec.path == "items[0].spec"


@pytest.mark.parametrize(
    ("kind", "path"),
    [("Pod", ""), ("Deployment", "spec.template."), ("Job", "spec.template."), ("CronJob", "spec.jobTemplate.spec.template.")],
)
def test_pods_are_found_in_every_workload(kind: str, path: str) -> None:
    value: object = {"spec": {"initContainers": [{"name": "a"}], "containers": [{"name": "b"}]}}
    for key in reversed(path.split(".")[:-1]):
        value = {key: value}
    assert isinstance(value, dict)
    (pod,) = pods([Setting({"kind": kind, "metadata": {"name": "n"}, **value}), Setting({"kind": "Service"}), Setting([1])])
    assert pod.name == f"{kind}/n"
    assert [(each.setting.path, each.init) for each in pod.containers] == [
        (f"{path}spec.initContainers[0]", True),
        (f"{path}spec.containers[0]", False),
    ]


def test_a_name_that_is_none_is_not_repeated() -> None:
    (pod,) = pods([Setting({"kind": "Pod", "metadata": {"name": "\x1b[2J"}})])
    assert pod.name == "Pod/?"


def test_documents_are_found_by_kind_and_name() -> None:
    documents = parse_documents(b"kind: A\nmetadata: {name: x}\n---\nkind: B\nmetadata: {name: x}\n")
    assert find(documents, "B", "x") is documents[1]
    assert find(documents, "B", "y") is None
    assert find(documents, "C", None) is None
