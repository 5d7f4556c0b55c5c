"""What a vLLM server loads beside itself, to take the policy's weights while it runs.

    PYTHONPATH=. VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --enable-scale-out
        --worker-extension-cls rl.engines.vllm_worker.PolicyWorker ...

vLLM imports this module in its own environment: it must import nothing of this project. Alone on another machine it
works too, as vllm_worker.PolicyWorker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class PolicyWorker:
    """Methods that vLLM adds to each of its workers; `/collective_rpc` calls them by name."""

    def load_policy(self, folder: str) -> dict[str, int]:
        """Load the weights of a Hugging Face folder in place.

        Args:
            folder: A path on the server's machine.

        Returns:
            `packed`: the layers of experts that were packed again.

        Raises:
            FileNotFoundError: It has no weights. Checked first, because vLLM loses the old weights where it fails.
        """
        if not list(Path(folder).glob("*.safetensors")):
            raise FileNotFoundError(f"{folder} has no weights on the server's machine")
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        runner.reload_weights(weights_path=folder)
        return {"packed": pack_experts(runner.get_model())}

    def describe_policy(self) -> dict[str, Any]:
        """Return the content of the served model's config.json, and what else a client must know."""
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        return {
            "config": config.model_config.hf_config.to_dict(),
            "logprobs_mode": config.model_config.logprobs_mode,
            "device": config.device_config.device_type,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        }


def pack_experts(model: Any) -> int:
    """Lay out routed experts for the CPU's kernel, and return for how many layers.

    vLLM 0.32 does so when it starts and not when it loads again: without this its answers are wrong, without an error.
    On other devices there is nothing to pack.
    """
    packed = 0
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and type(kernel.fused_experts).__name__.endswith("CPUUnquantizedExperts"):
            kernel.fused_experts.process_weights_after_loading(layer)
            packed += 1
    return packed
