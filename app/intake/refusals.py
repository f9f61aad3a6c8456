"""Why a file can be refused, each reason with its stable code and what to do about it."""

from __future__ import annotations

from typing import Literal

from app.errors import IntakeError
from app.spec.architectures import ARCHITECTURES

Code = Literal[
    "archive_bomb",
    "archive_corrupt",
    "archive_duplicate",
    "archive_encrypted",
    "archive_link",
    "archive_special_file",
    "archive_unsafe_path",
    "archive_unsupported",
    "config_invalid",
    "config_mismatch",
    "config_missing",
    "duplicate_tensor",
    "file_too_large",
    "hash_mismatch",
    "header_invalid",
    "images_invalid",
    "import_refused",
    "labels_invalid",
    "onnx_unsupported",
    "picture_invalid",
    "preprocessing_unknown",
    "preprocessor_missing",
    "quantized_model",
    "remote_code",
    "shard_missing",
    "tensor_missing",
    "text_invalid",
    "too_many_files",
    "truncated",
    "unknown_architecture",
    "unsafe_pickle",
    "unsupported_dtype",
    "unsupported_format",
    "weights_ambiguous",
    "weights_missing",
]

_UPLOAD_AGAIN = "Check the file at its source and upload it again."
_REPACK = "Pack the model's own files again, with `zip -r` or `tar -cf`, as plain files and folders."
_SAVE_AGAIN = (
    "Save the model again with `model.save_pretrained(folder)` from transformers and upload that folder."
)

_HINTS: dict[Code, str] = {
    "archive_bomb": "Pack without compression: weights hardly compress.",
    "archive_corrupt": _UPLOAD_AGAIN,
    "archive_duplicate": _REPACK,
    "archive_encrypted": "Pack it without a password.",
    "archive_link": "Pack the files themselves in place of links: `tar --dereference` or `zip` without `-y`.",
    "archive_special_file": _REPACK,
    "archive_unsafe_path": _REPACK,
    "archive_unsupported": "Use zip (stored or deflated), tar or tar.gz.",
    "config_invalid": _SAVE_AGAIN,
    "config_mismatch": "config.json and the weights must come from the same model. " + _SAVE_AGAIN,
    "config_missing": "Put the model's config.json beside its weights.",
    "duplicate_tensor": _SAVE_AGAIN,
    "file_too_large": "Leave files out that are not part of the model.",
    "hash_mismatch": _UPLOAD_AGAIN,
    "header_invalid": _SAVE_AGAIN,
    "images_invalid": (
        "Save with `numpy.savez(file, images=…, labels=…)`: images uint8 of (images, height, width, channels) or "
        "(images, channels, height, width) with 1 or 3 channels, labels integers from 0, one an image, if there are any."
    ),
    "import_refused": "Name what can be imported: hf://org/model@revision, or file:// below the import root.",
    "labels_invalid": "Give every text, or none, a label: an integer from 0, or the name of a class.",
    "onnx_unsupported": (
        "Convolutional image classifiers are read: export in float32 and evaluation mode, opset 13 or newer, with plain "
        "operators, a free batch and a fixed image size."
    ),
    "picture_invalid": "Save it again as JPEG, PNG, WebP or BMP, or leave it out of the archive.",
    "preprocessing_unknown": (
        "Known are the image processors of ViT, DeiT, ConvNeXT (ResNet) and MobileNet, with resize, crop, rescale and normalize."
    ),
    "preprocessor_missing": (
        "A model of images needs it to say how large they are and how pixels are scaled: save it with "
        "`image_processor.save_pretrained(folder)` from transformers."
    ),
    "quantized_model": "Upload the original in floating point: compressing twice loses quality twice.",
    "remote_code": (
        "Modelpress never runs code that comes with a model. If transformers has the architecture built in, remove "
        "`auto_map` from the JSON files and upload again."
    ),
    "shard_missing": "Upload every shard that model.safetensors.index.json names, in one go.",
    "tensor_missing": _SAVE_AGAIN,
    "text_invalid": "Save the text as UTF-8.",
    "too_many_files": "Leave files out that are not part of the model.",
    "truncated": "The file is shorter than its header says. " + _UPLOAD_AGAIN,
    "unknown_architecture": "Supported: " + ", ".join(sorted(ARCHITECTURES)) + ".",
    "unsafe_pickle": (
        "Pickles can run code when they are read. Convert: load the model with transformers where you trust it, then "
        "`model.save_pretrained(folder, safe_serialization=True)`, and upload that folder."
    ),
    "unsupported_dtype": "Save the weights as float32, float16 or bfloat16.",
    "unsupported_format": (
        "Models: a Hugging Face folder with safetensors (zip, tar, tar.gz, or separate files) or one GGUF file, or an image classifier as one "
        ".onnx file with its preprocessor_config.json (zip or tar). "
        'Datasets: .txt, .jsonl with one {"text": …} a line (and a "label", for classifiers), or images as .npz or .safetensors, or as '
        "picture files in folders by class (zip, tar, tar.gz)."
    ),
    "weights_ambiguous": "Upload one set of weights: model.safetensors, or the shards of one index.",
    "weights_missing": "Put model.safetensors (or its shards and their index) beside config.json.",
}  # fmt: skip


def refused(code: Code, detail: str, *, hint: str | None = None) -> IntakeError:
    """The error for a refused file."""
    return IntakeError(detail, code=code, hint=hint or _HINTS[code])
