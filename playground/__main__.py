"""Starts the playground: `python -m playground`."""

import os
import sys

from pydantic import ValidationError

from playground.settings import Settings


def main() -> int:
    """Serve until a signal; the exit code."""
    try:
        settings = Settings()
    except ValidationError as error:
        print(f"safelatent playground: {error.errors()[0]['msg']}", file=sys.stderr)
        return 2
    # Before gradio is imported: it asks home once at import, unless told not to.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from playground import theme
    from playground.page import build
    from playground.talk import Talk
    from safelatent.client import Client

    key = settings.api_key.get_secret_value() if settings.api_key else None
    with Client(settings.url, api_key=key, max_retries=1) as client:
        page = build(Talk(client), settings.url, settings.shown_url, key is not None)
        page.launch(
            server_name=settings.host,
            server_port=settings.port,
            root_path=settings.root_path,
            theme=theme.theme(),
            head=theme.HEAD,
            js=theme.JS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
