"""Opens every built page in a headless browser, at the widths of a screen and of a phone, and says what is cut off.

    make docs && python docs/look.py [PAGE …] [--widths 1280 390] [--shots FOLDER]

Printed, per page and width: what reaches over the edge of the page (a fault, exit code 1), and code or tables that
scroll in a box of their own (wide tables on a phone do). With --shots, a picture of each page and width for the eye.
Needs Chromium or Chrome on the PATH.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LEFT_OUT = ("genindex", "search", "py-modindex")
BUILT = Path(__file__).parent / "_build" / "html"

# Each page in a frame of the wanted width: what lies right of its edge in no box that scrolls, and the boxes that do.
SCRIPT = """<html><body><pre id=out></pre><script>
const found = [];
const scrolls = (d, e) => ['auto', 'scroll'].includes(d.defaultView.getComputedStyle(e).overflowX);
function held(d, e) {
  for (let a = e; a && a.tagName != 'ARTICLE'; a = a.parentElement) if (scrolls(d, a)) return true;
  return false;
}
function look(page, width) { return new Promise(done => {
  const frame = document.createElement('iframe');
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => setTimeout(() => {
    const d = frame.contentDocument, edge = d.documentElement.clientWidth, over = [], boxes = [];
    for (const e of d.querySelectorAll('article *')) {
      const r = e.getBoundingClientRect();
      if (r.width && r.right > edge + 1 && !held(d, e)) over.push(e.tagName + ' ' + e.textContent.trim().slice(0, 40));
    }
    for (const e of d.querySelectorAll('article pre, article .table-wrapper'))
      if (e.scrollWidth > e.clientWidth + 1) boxes.push(e.textContent.trim().slice(0, 40));
    if (d.documentElement.scrollWidth > edge) over.push('the page');
    found.push({page, width, over, boxes}); frame.remove(); done();
  }, 150);
  frame.src = page; document.body.appendChild(frame);
}); }
(async () => { for (const p of PAGES) for (const w of WIDTHS) await look(p, w);
  document.getElementById('out').textContent = 'FOUND' + JSON.stringify(found) + 'END'; })();
</script></body></html>"""


def open_in(browser: str, page: str, width: int, height: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page that is given as HTML, without a network."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "look.html"
        start.write_text(page, encoding="utf-8")
        shared = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-web-security",
            "--allow-file-access-from-files", "--hide-scrollbars", f"--user-data-dir={folder}",
            f"--window-size={width},{height}",
        ]  # fmt: skip
        argv = [browser, *shared, *options, start.as_uri()]
        return subprocess.run(argv, capture_output=True, text=True, timeout=600)


def look(browser: str, pages: list[Path], widths: list[int]) -> list[dict[str, object]]:
    """Return what the browser found, one entry per page and width."""
    script = SCRIPT.replace("PAGES", json.dumps([page.as_uri() for page in pages])).replace("WIDTHS", str(widths))
    done = open_in(browser, script, max(widths) + 100, 1000, "--virtual-time-budget=300000", "--dump-dom")
    answer = re.search(r"FOUND(\[.*\])END", done.stdout, re.DOTALL)
    if answer is None:
        sys.exit(f"{browser} did not finish: {done.stderr[-400:]}")
    found: list[dict[str, object]] = json.loads(html.unescape(answer[1]))
    return found


def shoot(browser: str, page: Path, width: int, height: int, folder: Path) -> None:
    """Write NAME-WIDTH.png, in a frame because windows have a least width."""
    style = f"width:{width}px;height:{height}px;border:0;display:block"
    frame = f'<body style="margin:0"><iframe style="{style}" src="{page.as_uri()}"></iframe></body>'
    target = folder.resolve() / f"{page.stem}-{width}.png"
    open_in(browser, frame, width, height, "--virtual-time-budget=3000", f"--screenshot={target}")
    print(target if target.exists() else f"{target}: {browser} wrote nothing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PAGE", help="its name without .html; all, if none is given")
    parser.add_argument("--widths", type=int, nargs="+", default=[1280, 390])
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="write a picture of each page and width")
    parser.add_argument("--height", type=int, default=2400, help="of the pictures")
    args = parser.parse_args()
    widths = args.widths
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    built = [*sorted(BUILT.glob("*.html")), *sorted(BUILT.glob("gallery/*.html"))]
    pages = [page for page in built if page.stem not in LEFT_OUT and (not args.names or page.stem in args.names)]
    if browser is None or not pages:
        sys.exit(
            f"none of {', '.join(BROWSERS)} is here" if browser is None else f"{BUILT}: no such pages, run make docs"
        )
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
        for page in pages:
            for width in widths:
                shoot(browser, page, width, args.height, args.shots)
    found = look(browser, pages, widths)
    for part in found:
        for kind in ("over", "boxes"):
            if part[kind]:
                what = "CUT OFF" if kind == "over" else "scrolls in its box"
                print(f"{Path(str(part['page'])).stem} at {part['width']}: {what}: {part[kind]}")
    faults = sum(bool(part["over"]) for part in found)
    print(f"{len(pages)} pages at {', '.join(map(str, widths))} pixels, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
