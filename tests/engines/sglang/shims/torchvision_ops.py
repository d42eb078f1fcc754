"""Appended to torchvision's `extension.py`: its wheels are built for CUDA, so beside a CPU torch their operators do
not load, and the import of torchvision fails where it describes two of them. Nobody calls them here."""

import torch

if not hasattr(torch.ops.torchvision, "nms"):
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
