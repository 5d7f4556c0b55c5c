"""The visible elements of a page in Chromium, from its accessibility tree.

The scripts below run in an isolated world: they see the page's document, but the page's own scripts cannot change the
functions that they call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.inputs.grounding.screen import ROLES, Element, Viewport

MAX_ELEMENTS = 2000

# Waits for fonts, then takes every animation to its end, or to its beginning if it has no end.
_SETTLE = """
document.fonts.ready.then(() => {
  for (const animation of document.getAnimations()) {
    try { animation.finish(); } catch { animation.cancel(); }
  }
  const style = document.createElement('style');
  style.textContent = '*, *::before, *::after { transition: none !important; caret-color: transparent !important; }';
  document.documentElement.append(style);
})
"""

# ([width, height], [measure contents], node, ...) -> for each node the box [x1, y1, x2, y2] of its visible part, or
# null. A node is visible if a part of it lies in the viewport and in the ancestors that hide their overflow, and if a
# hit test at five points of that part finds the node or a descendant (for text: its parent or a descendant).
_VISIBLE_BOXES = """
function (viewport, byContents, ...nodes) {
  const style = document.createElement('style');
  style.textContent = '* { pointer-events: auto !important; }';
  document.documentElement.append(style);
  const view = visualViewport;  // a phone scales down a page that is made for desktops
  const hit = (x, y) => {
    let found = document.elementFromPoint(x, y);
    while (found && found.shadowRoot) {
      const inner = found.shadowRoot.elementFromPoint(x, y);
      if (!inner || inner === found) break;
      found = inner;
    }
    return found;
  };
  const up = (node) => node.parentElement || (node.getRootNode() && node.getRootNode().host) || null;
  const within = (node, ancestor) => {
    for (let current = node; current; current = up(current)) if (current === ancestor) return true;
    return false;
  };
  const visibleBox = (node, index) => {
    const element = node.nodeType === Node.ELEMENT_NODE ? node : up(node);
    if (!element || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return null;
    let measured = node;
    if (node !== element || byContents[index]) {
      measured = document.createRange();
      measured.selectNodeContents(node);
    }
    const rect = measured.getBoundingClientRect();
    let [x1, y1, x2, y2] = [rect.left, rect.top, rect.right, rect.bottom];
    let [boundX1, boundY1] = [view.offsetLeft, view.offsetTop];
    let [boundX2, boundY2] = [boundX1 + viewport[0] / view.scale, boundY1 + viewport[1] / view.scale];
    for (let current = node === element ? up(element) : element; current; current = up(current)) {
      const computed = getComputedStyle(current);
      if (current === document.body || current === document.documentElement) continue;
      if (computed.overflowX === 'visible' && computed.overflowY === 'visible') continue;
      const frame = current.getBoundingClientRect();
      [boundX1, boundY1] = [Math.max(boundX1, frame.left), Math.max(boundY1, frame.top)];
      [boundX2, boundY2] = [Math.min(boundX2, frame.right), Math.min(boundY2, frame.bottom)];
    }
    [x1, y1] = [Math.max(x1, boundX1), Math.max(y1, boundY1)];
    [x2, y2] = [Math.min(x2, boundX2), Math.min(y2, boundY2)];
    if (x2 - x1 < 3 || y2 - y1 < 3) return null;
    for (const [along, down] of [[0.5, 0.5], [0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]) {
      const found = hit(x1 + along * (x2 - x1), y1 + down * (y2 - y1));
      if (!found || !within(found, element)) return null;
    }
    const [left, top] = [view.offsetLeft, view.offsetTop];
    return [x1 - left, y1 - top, x2 - left, y2 - top].map((value) => value * view.scale);
  };
  const boxes = nodes.map(visibleBox);
  style.remove();
  return boxes;
}
"""


async def settle(session: Any) -> None:
    """Wait for the fonts of a page and finish its animations.

    Args:
        session: A CDP session of the page.
    """
    await session.send(
        "Runtime.evaluate",
        {"expression": _SETTLE, "contextId": await _isolated_world(session), "awaitPromise": True},
    )


async def visible_elements(session: Any, viewport: Viewport) -> tuple[Element, ...]:
    """Return the named elements of a page's accessibility tree that are visible, at least in part.

    Only the first MAX_ELEMENTS named elements are looked at.

    Args:
        session: A CDP session of the page.
        viewport: The viewport that the page is shown in.
    """
    nodes = (await session.send("Accessibility.getFullAXTree"))["nodes"]
    named = list(_named(nodes))[:MAX_ELEMENTS]
    world = await _isolated_world(session)
    handles = await asyncio.gather(*(_handle(session, world, backend_id) for _, _, backend_id in named))
    present = [(role, name, handle) for (role, name, _), handle in zip(named, handles, strict=True) if handle]
    if not present:
        return ()
    answer = await session.send(
        "Runtime.callFunctionOn",
        {
            "functionDeclaration": _VISIBLE_BOXES,
            "executionContextId": world,
            "arguments": [
                {"value": [viewport.width, viewport.height]},
                {"value": [role == "heading" for role, _, _ in present]},
                *({"objectId": handle} for _, _, handle in present),
            ],
            "returnByValue": True,
        },
    )
    boxes = answer["result"]["value"]
    return tuple(
        Element(role, name, (box[0], box[1], box[2], box[3]))
        for (role, name, _), box in zip(present, boxes, strict=True)
        if box
    )


def _named(nodes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Yield (role, name, id of the DOM node) of every outermost element with a name, in document order.

    An element inside a named element is part of it.
    """
    by_id = {node["nodeId"]: node for node in nodes}
    stack: list[tuple[str, bool]] = [(nodes[0]["nodeId"], False)] if nodes else []
    while stack:
        node_id, inside = stack.pop()
        node = by_id.get(node_id)
        if node is None:
            continue
        role = ROLES.get(node.get("role", {}).get("value"), "")
        name = " ".join(str(node.get("name", {}).get("value") or "").split())
        taken = bool(role and name and not node.get("ignored") and not inside and "backendDOMNodeId" in node)
        if taken:
            yield role, name, node["backendDOMNodeId"]
        stack += [(child, inside or taken) for child in reversed(node.get("childIds", []))]


async def _handle(session: Any, world: int, backend_id: int) -> str | None:
    """Return a handle of a DOM node in the isolated world, or None if the node no longer exists."""
    from playwright.async_api import Error

    try:
        resolved = await session.send("DOM.resolveNode", {"backendNodeId": backend_id, "executionContextId": world})
    except Error:
        return None
    return resolved["object"].get("objectId")


async def _isolated_world(session: Any) -> int:
    """Create an isolated world in the page's main frame and return the id of its execution context."""
    frame = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
    return (await session.send("Page.createIsolatedWorld", {"frameId": frame}))["executionContextId"]
