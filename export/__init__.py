"""The ONNX file and everything that runs it."""
