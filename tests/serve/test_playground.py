"""The page at ``/``: reachable by anybody, complete in itself, and held to its own script by its policy."""

import base64
import hashlib
import re

import httpx

from tests.serve.scene import Scene


def test_the_page_needs_no_key_and_nothing_from_elsewhere(scene: Scene) -> None:
    reply = httpx.get(f"{scene.data}/")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    text = reply.text
    assert re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", text) == []
    assert set(re.findall(r'call\(["`](/[a-z0-9/]+)', text)) == {"/v1/items/search", "/v1/recommendations"}


def test_the_policy_names_exactly_the_pages_own_script_and_style(scene: Scene) -> None:
    reply = httpx.get(f"{scene.data}/")
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", reply.text, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_the_page_can_show_the_walk_to_every_result(scene: Scene) -> None:
    """Texts of the tokens are those of the item, end of text last; a probability per branch gives the path's."""
    with scene.client() as client:
        reply = client.recommend([3, 4], n=5, return_tokens=True)
    template = scene.engine.catalog.prompt_format.template
    for item in reply.items:
        assert len(item.token_texts) == len(item.tokens) == len(item.logprobs)
        assert "".join(item.token_texts[:-1]) == template.answer(item.title)
