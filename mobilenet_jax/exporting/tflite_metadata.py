"""The metadata of a TFLite file that task libraries read: input, normalisation, and the file of labels.

No package for current Python versions ships the schema, so the few tables that an image classifier needs are written
with the builder of `flatbuffers`. The numbers of fields and types are those of metadata_schema.fbs, identifier M001
(tflite-support 0.4.4, tensorflow_lite_support/metadata).
"""

import io
import zipfile
from collections.abc import Mapping, Sequence

import flatbuffers

NAME = "TFLITE_METADATA"  # of the buffer in the file
LABELS = "labels.txt"
_IDENTIFIER = b"M001"
_PARSER_VERSION = "1.0.0"
_RGB, _IMAGE_PROPERTIES, _NORMALISATION, _AXIS_LABELS = 1, 2, 1, 2


def pack_metadata(
    *,
    name: str,
    description: str,
    mean: Sequence[float],
    std: Sequence[float],
    takes_pixels: bool,
    has_labels: bool,
) -> bytes:
    """Return the ModelMetadata of a classifier of RGB images.

    Args:
      name: of the model.
      description: of the model.
      mean: in grey levels from 0 to 255; the input is (x - mean) / std.
      std: see `mean`.
      takes_pixels: the file normalises grey levels itself: it takes them as they are.
      has_labels: the file LABELS has the class names.
    """
    builder = flatbuffers.Builder(1024)
    if takes_pixels:
        mean, std = (0.0,), (1.0,)
    image = _table(builder, {0: ("Int8", _RGB)})
    content = _table(builder, {0: ("Uint8", _IMAGE_PROPERTIES), 1: ("Offset", image)})
    options = _table(builder, {0: ("Offset", _floats(builder, mean)), 1: ("Offset", _floats(builder, std))})
    unit = _table(builder, {0: ("Uint8", _NORMALISATION), 1: ("Offset", options)})
    levels = [[(level - m) / s for m, s in zip(mean, std, strict=True)] for level in (255, 0)]
    stats = _table(builder, {i: ("Offset", _floats(builder, level)) for i, level in enumerate(levels)})
    texts = {0: "image", 1: "RGB image, normalised by (x - mean) / std"}
    fields = {3: content, 4: _tables(builder, [unit]), 5: stats}
    given = _table(builder, {**_strings(builder, texts), **{slot: ("Offset", made) for slot, made in fields.items()}})
    files = {}
    if has_labels:
        texts = {0: LABELS, 1: "The name of each class, in the order of the logits"}
        labels = _table(builder, {**_strings(builder, texts), 2: ("Int8", _AXIS_LABELS)})
        files = {6: ("Offset", _tables(builder, [labels]))}
    returned = _table(builder, {**_strings(builder, {0: "logits", 1: "Logits of the classes"}), **files})
    ends = {2: ("Offset", _tables(builder, [given])), 3: ("Offset", _tables(builder, [returned]))}
    subgraph = _tables(builder, [_table(builder, ends)])
    texts = {0: name, 1: description, 7: _PARSER_VERSION}
    builder.Finish(_table(builder, {**_strings(builder, texts), 3: ("Offset", subgraph)}), _IDENTIFIER)
    return bytes(builder.Output())


def append_files(model: bytes, files: Mapping[str, str]) -> bytes:
    """Return the model with text files appended as a zip, where task libraries look for associated files."""
    stream = io.BytesIO(model)
    stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # the same date in every file
    return stream.getvalue()


def _table(builder: flatbuffers.Builder, fields: Mapping[int, tuple[str, int]]) -> int:
    """Write a table of {number of the field: (type, value)}."""
    builder.StartObject(max(fields) + 1)
    for slot, (kind, value) in fields.items():
        prepend = {
            "Offset": builder.PrependUOffsetTRelativeSlot,
            "Int8": builder.PrependInt8Slot,
            "Uint8": builder.PrependUint8Slot,
        }[kind]
        prepend(slot, value, 0)
    return builder.EndObject()


def _strings(builder: flatbuffers.Builder, texts: Mapping[int, str]) -> dict[int, tuple[str, int]]:
    return {slot: ("Offset", builder.CreateString(text)) for slot, text in texts.items()}


def _tables(builder: flatbuffers.Builder, tables: Sequence[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return builder.EndVector()


def _floats(builder: flatbuffers.Builder, values: Sequence[float]) -> int:
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependFloat32(value)
    return builder.EndVector()
