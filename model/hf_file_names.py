"""Names of the files of a Hugging Face folder, besides its weights."""

from model.hf_config import CONFIG_FILE

GENERATION_CONFIG = "generation_config.json"
PREPROCESSORS = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
PROCESSOR = "processor_config.json"  # of transformers 5: has the two preprocessors inside it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
HF_FILE_NAMES = (CONFIG_FILE, GENERATION_CONFIG, *PREPROCESSORS.values(), PROCESSOR, *TOKENIZER_FILES)
CHECKSUMS = "checksums.json"  # of an export of this program: checksums of its tensors and headers
