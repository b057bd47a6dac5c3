"""``nanoos serve``: campaigns, models, runs and features in a browser, and an API.

A view over the same stores and operations as the command line. It listens on this
machine's loopback only and answers nobody who does not know its token.
"""

from __future__ import annotations

from nanoos_fw.web.app import create_app, serve

__all__ = ["create_app", "serve"]
