"""The page's colours, type and spacing as a Gradio theme; what it cannot say is in style.css."""

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).parent
HEAD = f"<style>{(FOLDER / 'style.css').read_text()}</style>"
JS = (FOLDER / "page.js").read_text()

SANS = [
    "system-ui",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "DejaVu Sans",
    "sans-serif",
]
MONO = [
    "ui-monospace",
    "SF Mono",
    "Cascadia Mono",
    "Menlo",
    "Consolas",
    "DejaVu Sans Mono",
    "monospace",
]

# Light, dark. Text on its ground has a contrast of 4.5 or more (WCAG AA); a test measures it.
PAPER = "#f7f5f0", "#151613"
CARD = "#ffffff", "#1e1f1b"
INK = "#1f1d19", "#eceae3"
MUTED = "#635e54", "#a8a49a"
RULE = "#ddd8cc", "#3a3b35"
EDGE = "#8d8778", "#77756b"
"""Of what can be typed into or pressed: 3 to 1 on its ground."""
ACCENT = "#0c6b61", "#6ccabb"
ON_ACCENT = "#ffffff", "#08211d"


def theme() -> gr.themes.Base:
    """System fonts only: the page loads nothing from elsewhere."""

    def both(name: str, colours: tuple[str, str]) -> dict[str, str]:
        return {name: colours[0], f"{name}_dark": colours[1]}

    return gr.themes.Base(
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_sm,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
    ).set(
        **both("body_background_fill", PAPER),
        **both("background_fill_primary", CARD),
        **both("background_fill_secondary", PAPER),
        **both("body_text_color", INK),
        **both("body_text_color_subdued", MUTED),
        **both("block_background_fill", ("transparent", "transparent")),
        **both("block_border_color", ("transparent", "transparent")),
        **both("block_label_text_color", INK),
        **both("block_title_text_color", INK),
        **both("block_info_text_color", MUTED),
        **both("border_color_primary", RULE),
        **both("border_color_accent", ACCENT),
        **both("color_accent_soft", CARD),
        **both("panel_background_fill", ("transparent", "transparent")),
        **both("input_background_fill", CARD),
        **both("input_border_color", EDGE),
        **both("input_border_color_focus", ACCENT),
        **both("input_placeholder_color", MUTED),
        **both("slider_color", ACCENT),
        **both("button_primary_background_fill", ACCENT),
        **both("button_primary_background_fill_hover", ACCENT),
        **both("button_primary_text_color", ON_ACCENT),
        **both("button_primary_border_color", ACCENT),
        **both("button_primary_border_color_hover", ACCENT),
        **both("button_secondary_background_fill", CARD),
        **both("button_secondary_background_fill_hover", PAPER),
        **both("button_secondary_text_color", INK),
        **both("button_secondary_border_color", EDGE),
        **both("button_secondary_border_color_hover", INK),
        **both("checkbox_background_color", CARD),
        **both("checkbox_border_color", EDGE),
        **both("checkbox_background_color_selected", ACCENT),
        **both("checkbox_border_color_selected", ACCENT),
        **both("checkbox_border_color_focus", ACCENT),
        **both("checkbox_label_background_fill_selected", CARD),
        block_border_width="0px",
        block_padding="0px",
        block_label_text_weight="600",
        block_title_text_weight="600",
        block_shadow="none",
        input_shadow="none",
        input_shadow_focus="none",
        input_border_width="1px",
        button_border_width="1px",
    )
