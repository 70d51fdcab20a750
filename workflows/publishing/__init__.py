"""The end of a run as separate steps, each of which can be called alone.

`artifacts` is their sequence for the files of a model: `export` (sampler.onnx and its comparison with
PyTorch), `pictures`, `model_card`. `final_metrics` evaluates the model before that, and `registration` sends
the folder to the run's tracker and registers the model. `provenance` says where a model comes from, and
`summary` has the lines that train.py and tune.py both print at the end.
"""
