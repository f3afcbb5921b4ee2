"""Answers of OpenAI's API as JSON Schema."""

from typing import Any

from patchclamp_http.openai.kinds import nullable

JsonSchema = dict[str, Any]


def array(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


def obj(properties: JsonSchema, *optional: str) -> JsonSchema:
    """All properties are there but `optional`."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


TEXT: JsonSchema = {"type": "string"}
COUNT: JsonSchema = {"type": "integer", "minimum": 0}
NUMBER: JsonSchema = {"type": "number"}
EXTENSION: JsonSchema = {"$ref": "#/components/schemas/patchclamp.v1.GenerateResponse"}
REASON: JsonSchema = nullable({"type": "string", "enum": ["stop", "length"]})

ERROR = obj(
    {
        "error": obj(
            {"message": TEXT, "type": TEXT, "param": nullable(TEXT), "code": nullable(TEXT)},
        )
    }
)
USAGE = obj(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": obj({"cached_tokens": COUNT}),
    }
)
_HEAD: JsonSchema = {"id": TEXT, "object": TEXT, "created": COUNT, "model": TEXT}
_COMPLETION_LOGPROBS = nullable(
    obj(
        {
            "tokens": array(TEXT),
            "token_logprobs": array(nullable(NUMBER)),
            "top_logprobs": array(nullable({"type": "object", "additionalProperties": NUMBER})),
            "text_offset": array(COUNT),
        }
    )
)
_ENTRY: JsonSchema = {"token": TEXT, "logprob": NUMBER, "bytes": nullable(array(COUNT))}
_CHAT_LOGPROBS = nullable(
    obj({"content": array(obj({**_ENTRY, "top_logprobs": array(obj(_ENTRY))})), "refusal": {"type": "null"}})
)
COMPLETION = obj(
    {
        **_HEAD,
        "choices": array(
            obj(
                {
                    "index": COUNT,
                    "text": TEXT,
                    "logprobs": _COMPLETION_LOGPROBS,
                    "finish_reason": REASON,
                    "patchclamp": EXTENSION,
                },
                "patchclamp",
            )
        ),
        "usage": nullable(USAGE),
    },
    "usage",
)
CHAT = obj(
    {
        **_HEAD,
        "choices": array(
            obj(
                {
                    "index": COUNT,
                    "message": obj({"role": TEXT, "content": TEXT, "refusal": {"type": "null"}}),
                    "logprobs": _CHAT_LOGPROBS,
                    "finish_reason": REASON,
                    "patchclamp": EXTENSION,
                },
                "patchclamp",
            )
        ),
        "usage": USAGE,
    }
)
MODEL = obj(
    {
        "id": TEXT,
        "object": TEXT,
        "created": COUNT,
        "owned_by": TEXT,
        "max_model_len": COUNT,
        "patchclamp": {"$ref": "#/components/schemas/patchclamp.v1.Model"},
    }
)
MODELS = obj({"object": TEXT, "data": array(MODEL)})
EMBEDDINGS = obj(
    {
        "object": TEXT,
        "data": array(obj({"object": TEXT, "index": COUNT, "embedding": {"anyOf": [array(NUMBER), TEXT]}})),
        "model": TEXT,
        "usage": obj({"prompt_tokens": COUNT, "total_tokens": COUNT}),
    }
)
TOKENS = obj({"count": COUNT, "tokens": array(COUNT), "token_strs": array(TEXT)})
DETOKENIZED = obj({"prompt": TEXT, "token_strs": array(TEXT)})
HEALTH = obj({"status": TEXT})
# Of Connect, whose statuses are those of gRPC.
CONNECT_ERROR = obj(
    {"code": TEXT, "message": TEXT, "details": array(obj({"type": TEXT, "value": TEXT}))}, "message", "details"
)
