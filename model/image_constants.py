"""Constants of the images that both variants share; `model.config` refuses a config.json with other values."""

# CLIP's pixel statistics, as in the published preprocessor configurations. For colours from 0 to 1, in RGB order.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

CHANNELS = 3
MERGE_SIZE = 2  # MERGE_SIZE x MERGE_SIZE patches make one embedding
