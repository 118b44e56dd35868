"""Who is let in, and what a page may do."""

from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from known_token import TOKEN

from attnprof_dashboard.security import LOOPBACK, make_token, protect

HOST = {"Host": "127.0.0.1:8050"}


@pytest.fixture
def server() -> Flask:
    server = Flask("test")
    protect(server, token=TOKEN, hosts=LOOPBACK)
    server.add_url_rule("/", "page", lambda: "<p>page</p>", methods=["GET", "POST"])
    return server


@pytest.fixture
def stranger(server: Flask) -> FlaskClient:
    return server.test_client()


@pytest.fixture
def friend(server: Flask) -> FlaskClient:
    client = server.test_client()
    client.get(f"/?token={TOKEN}", headers=HOST)
    return client


def test_token_becomes_a_cookie_and_leaves_the_address(stranger: FlaskClient) -> None:
    response = stranger.get(f"/?run=a%26b&token={TOKEN}", headers=HOST)
    assert response.status_code == 303
    assert response.headers["Location"] == "/?run=a%26b"
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert stranger.get("/", headers=HOST).status_code == 200


def test_redirect_quotes_what_would_end_the_header(stranger: FlaskClient) -> None:
    response = stranger.get(f"/%0d%0aX:1?token={TOKEN}", headers=HOST)
    assert response.status_code == 303
    assert response.headers["Location"] == "/%0D%0AX%3A1"


def test_redirect_stays_on_this_host(stranger: FlaskClient) -> None:
    response = stranger.get(f"//evil.example/?token={TOKEN}", headers=HOST)
    assert not response.headers.get("Location", "/").startswith("//")


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", f"?token={TOKEN}x", "?token=é"])
def test_without_the_token_nothing_is_shown(stranger: FlaskClient, query: str) -> None:
    assert stranger.get(f"/{query}", headers=HOST).status_code == 403


def test_token_in_a_posted_address_is_not_enough(stranger: FlaskClient) -> None:
    assert stranger.post(f"/?token={TOKEN}", headers=HOST).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost:1", "LOCALHOST", "[::1]:8050"])
def test_own_hosts_are_known(stranger: FlaskClient, host: str) -> None:
    response = stranger.get(f"/?token={TOKEN}", headers={"Host": host})
    assert response.status_code == 303


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8050", "10.0.0.1"]
)
def test_foreign_host_is_refused_even_with_the_token(stranger: FlaskClient, host: str) -> None:
    response = stranger.get(f"/?token={TOKEN}", headers={"Host": host})
    assert response.status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:9999", "http://localhost:8050", "null"]
)
def test_foreign_origin_is_refused(friend: FlaskClient, origin: str) -> None:
    headers = {**HOST, "Origin": origin}
    assert friend.post("/", headers=headers).status_code == 403
    assert friend.get("/", headers=headers).status_code == 403


def test_own_origin_is_let_in(friend: FlaskClient) -> None:
    headers = {**HOST, "Origin": "http://127.0.0.1:8050"}
    assert friend.post("/", headers=headers).status_code == 200


def test_cross_site_post_without_origin_is_refused(friend: FlaskClient) -> None:
    headers = {**HOST, "Sec-Fetch-Site": "cross-site"}
    assert friend.post("/", headers=headers).status_code == 403


def test_headers_forbid_what_pages_do_not_need(friend: FlaskClient) -> None:
    headers = friend.get("/", headers=HOST).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_refusals_have_the_headers_too(stranger: FlaskClient) -> None:
    response = stranger.get("/", headers=HOST)
    assert response.status_code == 403
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_tokens_are_long_and_differ() -> None:
    assert make_token() != make_token()
    assert len(make_token()) >= 32


ADDRESSES = (
    "/",
    "/timeline",
    "/_dash-layout",
    "/_dash-dependencies",
    "/assets/app.js",
    "/export/overview.html",
    "/_mcp",
    "/_dash-component-suites/plotly/package_data/plotly.min.js",
)


@pytest.mark.parametrize("path", ADDRESSES)
def test_every_address_of_the_app_needs_the_token(client: FlaskClient, path: str) -> None:
    stranger = client.application.test_client()
    assert stranger.get(path, headers={"Host": "127.0.0.1"}).status_code == 403


def test_callbacks_need_the_token(client: FlaskClient) -> None:
    stranger = client.application.test_client()
    response = stranger.post("/_dash-update-component", json={}, headers={"Host": "127.0.0.1"})
    assert response.status_code == 403


def test_there_is_no_mcp_server(client: FlaskClient) -> None:
    rules = {str(rule) for rule in client.application.url_map.iter_rules()}
    assert not [rule for rule in rules if "mcp" in rule.lower()]


@pytest.mark.parametrize("path", ["dash/deps/none.js", "none/at/all.js", "plotly/../../x"])
def test_unknown_component_file_is_not_found(client: FlaskClient, path: str) -> None:
    response = client.get(f"/_dash-component-suites/{path}", headers={"Host": "127.0.0.1"})
    assert response.status_code == 404


def test_server_does_not_bind_other_addresses_without_a_token(tmp_path: Path) -> None:
    from attnprof.errors import CommandError
    from attnprof_dashboard.serve import bind

    with pytest.raises(CommandError, match="--token"):
        bind(tmp_path, host="0.0.0.0")
    with pytest.raises(CommandError, match="--token"):
        bind(tmp_path, host="0.0.0.0", token="short")
