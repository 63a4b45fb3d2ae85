"""Convert the weights in a checkpoint directory, whatever their format, to model.pth beside them.

Read are Hugging Face's safetensors and .bin, Meta's consolidated.*.pth, llama2.c's stories*.pt and GGUF; of quantised
ones GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, NVFP4 and GGUF's types.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("convert_hf_checkpoint")


from checkpoint import DTYPES
from formats.config import BUILTIN
from formats.convert import convert
from process.command import Parser


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints/SmolLM2-135M-Instruct"))
    parser.add_argument("--model_name", choices=sorted(BUILTIN), help="for weights without a config.json")
    kept = "by default bf16, and quantised linear layers stay in their bits"
    parser.add_argument("--dtype", choices=sorted(DTYPES), help=f"of all weights in model.pth; {kept}")
    args = parser.parse_args()
    print(f"Saved {convert(args.checkpoint_dir, DTYPES.get(args.dtype), args.model_name)}", file=sys.stderr)
