"""``network.json``: what an inference needs to know of a training; light to import, for a command line that answers."""

#: Its name, beside a run's ``model.pt``: an overlay for inference.json and evaluate.json.
OVERLAY = "network.json"
#: Its entries, of those of the training's configuration.
NETWORK_KEYS = ("labels", "num_classes", "image_size", "flips", "min_confidence", "scales", "network_def")
