"""Small tokenizers with the special tokens and the shape of turns of families in use."""

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers


def tokenizer(specials, *, eos, pad=None, bos=None, template=None, plain=()):
    """One token a byte; `specials` are special, `plain` only added."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in specials])
    core.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in plain])
    names = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def turns(user, assistant, end, *, user_end=None, prompt=None, last=""):
    """A template: `user` content `user_end` `assistant` content `end` …, `last` at the end."""
    user_end = end if user_end is None else user_end
    prompt = assistant if prompt is None else prompt
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + f"{assistant}{{{{ m.content }}}}{end}"
        + "{% else %}"
        + f"{user}{{{{ m.content }}}}{user_end}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + f"{prompt}{{% else %}}{last}{{% endif %}}"
    )


CHATML = turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n")
LLAMA3 = turns(
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)
PHI = turns("<|user|>\n", "<|assistant|>\n", "<|end|>\n", last="{{ eos_token }}")
GEMMA = turns(
    "{{ bos_token if loop.first else '' }}<start_of_turn>user\n",
    "<start_of_turn>model\n",
    "<end_of_turn>\n",
)
MISTRAL = turns("[INST] ", " ", "</s>", user_end=" [/INST]", prompt="")
COMMAND = turns(
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
)
COMMAND_NEXT = COMMAND.replace("{% if add_generation_prompt %}", "{% if true %}")
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|channel|>final<|message|>{% endif %}"
)
OLMO = turns("<|user|>\n", "<|assistant|>\n", "{{ eos_token }}\n", user_end="\n")
