"""Model families: config.json into one vocabulary, checkpoints into layers. A new family is a line here and a file.

FAMILIES   model_type in config.json -> (architecture in config.json, module with `read` and `mixer`)
"""

FAMILIES = {
    "llama": ("LlamaForCausalLM", "nanokv.models.llama"),
    "mistral": ("MistralForCausalLM", "nanokv.models.llama"),
    "qwen2": ("Qwen2ForCausalLM", "nanokv.models.llama"),
    "qwen3": ("Qwen3ForCausalLM", "nanokv.models.llama"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "nanokv.models.llama"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "nanokv.models.llama"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "nanokv.models.llama"),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "nanokv.models.deepseek"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "nanokv.models.deepseek"),
    "kimi_k2": ("DeepseekV3ForCausalLM", "nanokv.models.deepseek"),
    "qwen3_next": ("Qwen3NextForCausalLM", "nanokv.models.qwen3_next"),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", "nanokv.models.qwen3_next"),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", "nanokv.models.qwen3_next"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "nanokv.models.qwen3_next"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "nanokv.models.qwen3_next"),
}
