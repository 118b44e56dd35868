"""Who may ask this server, and what its pages may do in a browser.

Loopback is no protection by itself: other users of a shared machine reach it, and so does any page
open in the user's browser. So every request needs a token, names a host we know, and, where a
browser says where it comes from, comes from here.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Collection, Sequence
from urllib.parse import quote, urlencode, urlsplit

from flask import Flask, Response, abort, redirect, request
from werkzeug.wrappers import Response as AnyResponse

COOKIE = "attnprof-token"
QUERY = "token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def make_token() -> str:
    """Return a new token: 192 bits that nobody guesses."""
    return secrets.token_urlsafe(24)


def protect(
    server: Flask,
    *,
    token: str,
    hosts: Collection[str] = LOOPBACK,
    script_hashes: Callable[[], Sequence[str]] = tuple,
    prefix: str = "/",
    frames: Sequence[str] = (),
) -> None:
    """Check every request to a server and put the headers on every response.

    To be called before anything else registers what it does with requests.

    Args:
        server: The server.
        token: What a browser must know.
        hosts: Host names, without port, under which the server is reached.
        script_hashes: Returns sources of inline scripts that may run; asked for every page.
        prefix: The path under which the server is reached.
        frames: Origins of pages that may show this one in a frame.
    """
    allowed = {_fold(host) for host in hosts}
    # Servers on other ports of this host share its cookies: each has a name of its own.
    cookie = f"{COOKIE}-{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    @server.before_request
    def check() -> AnyResponse | None:
        host = _fold(_host_of(f"//{request.host}"))
        if host not in allowed:
            abort(403, f"unknown host {host!r}; reach this dashboard by one of its own names")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            abort(403, "this request was sent by another site")
        if request.headers.get("Sec-Fetch-Site") == "cross-site" and request.method != "GET":
            abort(403, "this request was sent by another site")
        given = request.args.get(QUERY)
        if given is not None and request.method == "GET" and _is_equal(given, token):
            return _let_in(cookie, token, prefix)
        if not _is_equal(request.cookies.get(cookie, ""), token):
            abort(403, "the token is missing or wrong; open the address that was printed")
        return None

    @server.after_request
    def add_headers(response: Response) -> Response:
        is_page = response.mimetype == "text/html"
        hashes = script_hashes() if is_page else ()
        response.headers["Content-Security-Policy"] = _make_policy(hashes, frames)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        return response


def _let_in(cookie: str, token: str, prefix: str) -> AnyResponse:
    """Keep the token in a cookie, and out of the address bar, history and referrers."""
    rest = [(name, text) for name, text in request.args.items(multi=True) if name != QUERY]
    query = f"?{urlencode(rest)}" if rest else ""
    # One slash: what begins with two is the address of another host.
    path = "/" + quote(request.root_path + request.path).lstrip("/")
    response = redirect(f"{path}{query}", code=303)
    response.set_cookie(cookie, token, httponly=True, samesite="Strict", path=prefix)
    return response


def _make_policy(script_hashes: Sequence[str], frames: Sequence[str]) -> str:
    ancestors = " ".join(frames) or "'none'"
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(["'self'", *script_hashes]),
        # Mantine and Plotly write style elements of their own.
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": ancestors,
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _is_equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _fold(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
