"""What the model says to a person's prompts."""

from typing import Any

from jaxtrain.model import LanguageModel
from jaxtrain.recipe.guards import SamplesConfig


def answers(model: LanguageModel, params: Any, tokenizer: Any, wanted: SamplesConfig) -> list[str]:
    """The answer to each prompt, through the chat template, up to the end of the turn."""
    system = [{"role": "system", "content": wanted.system}] if wanted.system else []
    prompts = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        for prompt in wanted.prompts
    ]
    found = model.generate(
        params,
        prompts,
        max_new_tokens=wanted.max_new_tokens,
        eos_ids=[tokenizer.eos_token_id],
        temperature=wanted.temperature,
        top_p=wanted.top_p,
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]
