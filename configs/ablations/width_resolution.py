"""Width against resolution: accuracy against multiply-adds.

    python -m mobilenet_jax.ablate --config configs/ablations/width_resolution.py --workdir DIR

Question: for a given number of multiply-adds, is a narrower network or a smaller image better?

Paper: 1704.04861 Table 6 (widths 1, .75, .5, .25 at 224 px: 70.6, 68.4, 63.7, 50.6%), Table 7 (width 1 at 224, 192,
160, 128 px: 70.6, 69.1, 67.2, 64.4%) and Table 9 (.5 at 160 px: 60.2%); Fig. 4 draws all sixteen
combinations: log-linear, with a jump at .25. The images here have 28 px and are enlarged to 32; the other sizes are a
seventh of the sizes in the paper, rounded to a multiple of 4.

Found here: not run at length.
"""

from configs import datasets, v1

SIZES = (32, 28, 24, 16)  # pixels, instead of 224, 192, 160 and 128


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v1.get_config(dataset), dataset, width=1.0)


def sweep() -> dict:
    variants = {}
    for width in (1.0, 0.75, 0.5, 0.25):
        for size in SIZES:
            changes = {"model.width": width} if width < 1 else {}
            variants[f"width_{width:g}_{size}px"] = changes | ({"data.image_size": size} if size < SIZES[0] else {})
    return {
        "baseline": "width_1_32px",
        "variants": variants,
        "published": {
            "width_1_32px": 70.6,
            "width_0.75_32px": 68.4,
            "width_0.5_32px": 63.7,
            "width_0.25_32px": 50.6,
            "width_1_28px": 69.1,
            "width_1_24px": 67.2,
            "width_1_16px": 64.4,
            "width_0.5_24px": 60.2,
        },
        "source": "1704.04861 Tables 6, 7 and 9, V1 on ImageNet at seven times the size (224 to 128 px)",
        "figure": "frontier",
        "series": "data.image_size",
    }
