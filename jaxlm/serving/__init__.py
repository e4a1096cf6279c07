"""Models behind HTTP: OpenAI's API, translation, inspection, and a page in the browser. ``jaxlm serve`` as a library.

    from jaxlm.serving import make_app, serve, serve_model

    serve({"small": lm}, port=8000)                      # until a signal ends it
    app = make_app([serve_model("small", lm)])           # an ASGI application, for a server of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.serving.access import ApiKeys
    from jaxlm.serving.app import RequestLimits, make_app
    from jaxlm.serving.middleware import ServerMiddleware
    from jaxlm.serving.models import ModelSource, ServedModel, serve_model
    from jaxlm.serving.protocol.errors import ApiError
    from jaxlm.serving.protocol.openapi import openapi_document
    from jaxlm.serving.server import serve
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, access="ApiKeys", app="RequestLimits make_app", middleware="ServerMiddleware",
        models="ModelSource ServedModel serve_model", protocol__errors="ApiError",
        protocol__openapi="openapi_document", server="serve",
    )
