"""torchvision's MobileNets, and timm's V1 and V4, in PyTorch with channels_last.

The side `torch` runs eagerly and does not fold batch norm. The side `torch_compile` runs under `torch.compile`, which
folds it at inference: the weights are constants of the program there (`freezing`).
"""

import time

from protocol import Run, UnsupportedError, measure_peak, serve


def load(case: dict) -> tuple[Run, dict]:
    """Load a model, its optimizer and one batch of float32 images, which every step uses."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(case["threads"])
    torch.set_num_interop_threads(1)
    torch.manual_seed(0)
    model, versions = make_model(case["name"], case["width"])
    if case["devices"] > 1:
        raise UnsupportedError("runs on one device here")
    model = model.to(memory_format=torch.channels_last)
    size, count = case["resolution"], case["batch_size"]
    images = torch.rand(count, 3, size, size).mul(2).sub(1).to(memory_format=torch.channels_last)
    labels = torch.arange(count) % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return time.perf_counter() - start

    def infer(steps: int) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(steps):
                model(images)
            return time.perf_counter() - start

    infers = case["what"] == "infer"
    model.train(not infers)
    about = {"versions": {"torch": torch.__version__, **versions}, "threads": torch.get_num_threads()}
    run = infer if infers else train
    if case["side"] == "torch_compile":
        import torch._inductor.config as inductor  # pyright: ignore[reportMissingImports]

        inductor.freezing = infers
        model = torch.compile(model)
        about["first_step_seconds"] = run(1)  # compiles
    return run, {**about, **(measure_peak(run) if case["what"] == "memory" else {})}


def make_model(name: str, width: float):
    """Return (the module, the versions of its packages); raise UnsupportedError if no package has it."""
    if name == "mobilenet_v1" or name.startswith("mobilenet_v4_"):
        import timm  # pyright: ignore[reportMissingImports]

        if width != 1:
            raise UnsupportedError(f"timm has {name} only at width 1")
        theirs = {"mobilenet_v1": "mobilenetv1_100"}.get(name, name.replace("mobilenet_v4", "mobilenetv4"))
        return timm.create_model(theirs), {"timm": timm.__version__}
    import torchvision  # pyright: ignore[reportMissingImports]

    models = {
        "mobilenet_v2": torchvision.models.mobilenet_v2,
        "mobilenet_v3_large": torchvision.models.mobilenet_v3_large,
        "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    }
    if name not in models:
        raise UnsupportedError(f"torchvision has no {name}")
    return models[name](width_mult=width), {"torchvision": torchvision.__version__}


if __name__ == "__main__":
    serve(load)
