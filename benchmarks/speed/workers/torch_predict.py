"""Name what is on a folder of photographs with torchvision, as its users do: MODEL FOLDER THREADS; prints CSV.

Two processes decode while the network computes.
"""

import csv
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch_worker import make_model


class Photographs(torch.utils.data.Dataset):
    """The images of a folder, prepared as torchvision's reference prepares them for evaluation."""

    def __init__(self, files: list[Path]):
        from torchvision import transforms  # pyright: ignore[reportMissingImports]

        self._files = files
        self._prepare = transforms.Compose(
            [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int):
        with Image.open(self._files[index]) as image:
            return self._prepare(image.convert("RGB"))


def main() -> None:
    """Print the five most probable classes of each image."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    model = make_model(name, 1.0)[0].eval().to(memory_format=torch.channels_last)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    loader = torch.utils.data.DataLoader(Photographs(files), batch_size=32, num_workers=threads)
    writer, rest = csv.writer(sys.stdout), iter(files)
    writer.writerow(("path", "rank", "class", "probability"))
    with torch.inference_mode():
        for images in loader:
            answers = model(images.to(memory_format=torch.channels_last)).softmax(-1).topk(5)
            for probabilities, classes in zip(answers.values.tolist(), answers.indices.tolist(), strict=True):
                path = next(rest)
                pairs = zip(classes, probabilities, strict=True)
                writer.writerows((path, rank, *pair) for rank, pair in enumerate(pairs, start=1))


if __name__ == "__main__":
    main()
