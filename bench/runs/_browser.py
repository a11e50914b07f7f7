"""Pictures of pages as a browser draws them: Chromium in Qt's WebEngine, if that is installed."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from tritium.bench.ends import FailedError

MISSING = (
    "a picture of a page needs a browser; run: "
    "pip install 'PySide6-Essentials==6.8.3' 'PySide6-Addons==6.8.3'"
)
SETTLED = 1000  # milliseconds after loading
PATIENCE = 60_000


class BrowserError(FailedError):
    """The page could not be drawn."""


def photograph(page: Path, picture: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Draw the top of a page, without its scroll bars, into a PNG.

    Args:
        page: the HTML or SVG file.
        picture: the PNG.
        width: in pixels, as `height`.
        dark: as a browser set to dark pages draws it.

    Raises:
        BrowserError: "needs a browser"; or the page did not load, or its script failed.
    """
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")
    scheme = " --blink-settings=preferredColorScheme=0" if dark else ""
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"--disable-gpu{scheme}"
    try:
        core, widgets, engine, views = (
            import_module(f"PySide6.{name}")
            for name in ("QtCore", "QtWidgets", "QtWebEngineCore", "QtWebEngineWidgets")
        )
    except ImportError as error:
        raise BrowserError(f"{MISSING} ({error})") from None
    said: list[str] = []

    class Page(engine.QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str):  # noqa: N802 (Qt's)
            said.append(f"line {line}: {message}")

    application = widgets.QApplication.instance() or widgets.QApplication([])
    view = views.QWebEngineView()
    view.setPage(Page(view))
    view.settings().setAttribute(engine.QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.resize(width, height)
    drawn: list[bool] = []

    def save() -> None:
        drawn.append(view.grab().save(str(picture)))
        application.quit()

    view.loadFinished.connect(lambda _: core.QTimer.singleShot(SETTLED, save))
    core.QTimer.singleShot(PATIENCE, application.quit)
    view.load(core.QUrl.fromLocalFile(str(page.resolve())))
    view.show()
    application.exec()
    if said or drawn != [True]:
        raise BrowserError(f"{page} was not drawn: {'; '.join(said) or 'it did not load'}")
