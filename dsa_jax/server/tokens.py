"""`/tokenize`, `/detokenize` and `/tokenizer_info`: what clients ask that count or score by tokens."""

from typing import Any

from dsa_jax.inference.text import encode_text
from dsa_jax.server.chat import encode_messages
from dsa_jax.server.errors import ApiError
from dsa_jax.server.jobs import check_model
from dsa_jax.server.protocol import DetokenizeRequest, TokenizeRequest
from dsa_jax.server.service import Service


def tokenize(body: TokenizeRequest, service: Service) -> dict[str, Any]:
    """Returns the tokens of a text, or of a conversation.

    The spelling of a special token within a text is text; a text that is nothing else is that token, which is how
    clients learn its id.

    Raises:
      ApiError: naming what is wrong.
    """
    check_model(body.model, service)
    if body.messages is not None:
        ids = encode_messages(
            service, body.messages, body.tools, add_generation_prompt=body.add_generation_prompt
        )  # fmt: skip
    else:
        ids = _encode(body.prompt or "", bool(body.add_special_tokens is not False), service)
    texts = [service.vocabulary.text(each) for each in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.longest, "tokens": ids, "token_strs": texts}


def _encode(text: str, add_special: bool, service: Service) -> list[int]:
    tokenizer = service.engine.tokenizer
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    if text in special:
        return [special[text]]
    try:
        return encode_text(tokenizer, text, add_special_tokens=add_special)
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt") from None


def detokenize(body: DetokenizeRequest, service: Service) -> dict[str, Any]:
    """Returns the text of tokens, special ones by their names.

    Raises:
      ApiError: for another model, or ids that no token has.
    """
    check_model(body.model, service)
    size = service.engine.runner.config.vocab_size
    if any(token >= size for token in body.tokens):
        raise ApiError(400, f"tokens must be below {size:,}", param="tokens")
    return {"prompt": service.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Returns the special tokens, and how long a sequence may be."""
    return {"tokenizer_class": "tokenizers.Tokenizer", "max_model_len": service.longest, **service.special}
