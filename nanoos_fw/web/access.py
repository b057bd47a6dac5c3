"""Who may ask: programs on this machine that know the token.

Loopback alone protects nobody: every user of a login node reaches its ports, and so
does a web page that the user has open elsewhere (a request across origins, or a name
of its own that it points at 127.0.0.1). So every request needs the token, the ``Host``
must be a loopback name, and a request that a browser sends for another page is refused.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Next = Callable[[Request], Awaitable[Response]]


class Gate:
    """Middleware that lets a request with the token pass.

    Parameters
    ----------
    token
        Compared in constant time. Programs send ``Authorization: Bearer TOKEN``; a
        browser opens a page with ``?token=TOKEN`` once and keeps a cookie.
    """

    def __init__(self, token: str) -> None:
        self._token = token

    async def __call__(self, request: Request, call_next: Next) -> Response:
        """Answer 403 or 401, or what is behind the gate."""
        response = self._refusal(request) or self._entrance(request)
        if response is None:
            response = await call_next(request)
        for name, value in _SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def _refusal(self, request: Request) -> Response | None:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if host not in _LOOPBACK:
            return _error(403, "only loopback addresses are answered", "use 127.0.0.1")
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            return _error(403, "requests of other web pages are refused", None)
        return None

    def _entrance(self, request: Request) -> Response | None:
        cookie = cookie_name(request)
        if self._is_token(_bearer(request)) or self._is_token(
            request.cookies.get(cookie)
        ):
            return None
        if not self._is_token(request.query_params.get("token")):
            return _error(
                401,
                "the token is missing or wrong",
                "open the address that 'nanoos serve' printed, or send it as "
                "'Authorization: Bearer TOKEN'",
            )
        # The token leaves the address, and with it the history and any screenshot.
        rest = [(k, v) for k, v in parse_qsl(request.url.query) if k != "token"]
        where = request.url.path + (f"?{urlencode(rest)}" if rest else "")
        response = RedirectResponse("/" + where.lstrip("/"), status_code=303)
        response.set_cookie(cookie, self._token, httponly=True, samesite="lax")
        return response

    def _is_token(self, given: str | None) -> bool:
        return given is not None and hmac.compare_digest(
            given.encode(), self._token.encode()
        )


def cookie_name(request: Request) -> str:
    """Return the cookie's name: cookies know no ports, servers of two users differ."""
    return f"nanoos-{request.url.port or 80}"


def _bearer(request: Request) -> str | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def _error(status: int, message: str, advice: str | None) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(
        {"kind": "access", "message": message, "evidence": {}, "advice": advice},
        status,
        headers=headers,
    )
