"""ONNX Runtime: graphs, their nodes, and explicit roundings."""
