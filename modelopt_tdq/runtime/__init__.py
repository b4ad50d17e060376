"""Running an exported model: ONNX Runtime, OpenVINO, TensorRT-RTX, TensorRT."""
