import pytest

from mergetool.publish.privacy import Privacy, last_part

PRIVACY = Privacy(("/srv/my models/llama.v1", "/srv/a", "~/x"), "/home/ann/recipes")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model: /srv/my models/llama.v1", "model: llama.v1"),
        ("model: '/srv/a'  # and /srv/ab/c, /srv/a/b", "model: 'a'  # and c, a/b"),
        ("base_model: ~/x", "base_model: x"),
        ("# as in /home/bob/notes.txt:3", "# as in notes.txt:3"),
        ("/home/ann/recipes/r.yaml:3:1: odd", "r.yaml:3:1: odd"),
        ("see https://example.org/a/b and arXiv:2306.01708", "see https://example.org/a/b and arXiv:2306.01708"),
        ("model: org/name@main", "model: org/name@main"),
        ("name: '*/mlp/up'", "name: '*/mlp/up'"),
        ("model: ../models/a", "model: ../models/a"),
        ("1/2/3", "1/2/3"),
    ],
)
def test_absolute_paths_are_shortened_and_nothing_else(text, shown):
    assert PRIVACY.hide(text) == shown


def test_sources_in_plain_data_are_called_as_in_public():
    privacy = Privacy(("/srv/a",), "", {"/srv/a": "a", "../x/b": "b (2)"})
    data = {"../x/b": ["/srv/a", 0.5, None, True], "text": "../x/b and /srv/a/c and /home/bob/d"}
    assert privacy.hide_in(data) == {"b (2)": ["a", 0.5, None, True], "text": "../x/b and a/c and d"}


@pytest.mark.parametrize(("path", "name"), [("/a/b/", "b"), ("a/../c", "c"), ("..", ""), (".", ""), ("x", "x")])
def test_the_last_part_of_a_path(path, name):
    assert last_part(path) == name
