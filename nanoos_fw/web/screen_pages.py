"""Pages of screenings: how far they are, what they cost, and their reports."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from nanoos_fw.web.api import existing, state_of
from nanoos_fw.web.pages import page

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/screens")
def screens(request: Request) -> HTMLResponse:
    """Show all screenings. Reads sizes of chunks only, no predictions."""
    from nanoos_fw.stores.screens import ScreenStore

    state = state_of(request)
    rows: list[dict[str, Any]] = []
    with state.lock:
        store = ScreenStore(state.database)
        for name in store.names():
            screen = store.get(name)
            progress = store.progress(screen)
            left = screen.count - progress.candidates
            hours_left = left / progress.rate / 3600 if progress.rate else None
            estimated = screen.core_s_estimated
            rows.append(
                {
                    "screen": screen,
                    "progress": progress,
                    "hours": progress.core_s / 3600,
                    "hours_left": hours_left,
                    "hours_estimated": None if estimated is None else estimated / 3600,
                }
            )
    return page(request, "screens", screens=rows)


@router.get("/screens/{name:path}/report")
def screen_report(name: str, request: Request) -> HTMLResponse:
    """Show the report of a screening as the stores have it now."""
    from nanoos_fw.reports import collect_screen, render_screen
    from nanoos_fw.stores.screens import ScreenStore

    state = state_of(request)
    with state.lock:
        existing(lambda: ScreenStore(state.database).get(name))
        part = collect_screen(state.database, name)
    return HTMLResponse(render_screen(part, "/screens"))
