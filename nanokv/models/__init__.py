"""Model families: config.json in one vocabulary, checkpoints into modules. A new family is one line here and one file.

FAMILIES   model_type in config.json -> (architecture in config.json, module with `tensors` and `build`)
"""

FAMILIES = {
    "llama": ("LlamaForCausalLM", "nanokv.models.llama"),
}
