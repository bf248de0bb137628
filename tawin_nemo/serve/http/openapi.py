"""Write the OpenAPI documents of both planes beside this file: ``python -m tawin_nemo.serve.http.openapi``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tawin_nemo.serve.http.control import control_app
from tawin_nemo.serve.http.data_plane import data_app
from tawin_nemo.util.files import atomic_path

FOLDER = Path(__file__).parent


def documents() -> Mapping[str, str]:
    """The OpenAPI documents of both planes: file name -> JSON text."""
    made = {"openapi.json": data_app(None).openapi(), "openapi_control.json": control_app(None).openapi()}
    return {name: json.dumps(document, indent=1, sort_keys=True) + "\n" for name, document in made.items()}


def main() -> None:
    """Write the documents into this folder."""
    for name, text in documents().items():
        with atomic_path(FOLDER / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
