"""The format "onnx": a graph that onnxruntime, and in part OpenVINO, runs without torch, made from the modules.

The compressed layers are traced in forms that speak of ONNX operators directly: no full-precision twin of the model is
made, and no finished graph is searched for weights. What a form does to a layer says its file:

    folded.py     weights kept packed in the file, made whole when it is loaded
    int8.py       products of whole numbers, inputs of 8 bits with a range for each token
    blocks.py     MatMulNBits: weights stay packed in memory, inputs in floating point
    standard.py   DequantizeLinear of opset 21: the same with standard operators alone
    lookup.py     embeddings: rows are looked up packed
"""
