"""The bundled model's own world: sprites, what they show, how it is worded, drawn and judged."""
