import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a lookup on the Hub fails at once; read when huggingface_hub is imported
os.environ["TQDM_DISABLE"] = "1"

import torch

torch.set_num_threads(1)  # tiny models spend more on waking threads than on arithmetic
