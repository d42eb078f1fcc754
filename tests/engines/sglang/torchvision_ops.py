

# Appended by `make engines-sglang`: torchvision's wheels are built for CUDA, so on a CPU build of torch their operators
# do not load, and importing torchvision fails where it describes them. Nobody calls them here.
if not _has_ops():
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define(
        "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
