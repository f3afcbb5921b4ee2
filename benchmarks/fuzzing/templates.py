"""Random chat templates: right ones, odd ones, ones that fail, and ones that are none."""

from random import Random

HEADERS = ("<s>{{ m.role }}\n", "{{ '[' + m.role + ']' }}", "{{ m['role'] ~ loop.index }}: ", "", "<</{{ m.role }}>>")
CONTENTS = (
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ m.content | upper }}",
    "{{ m.content }}{{ m.content }}",
    "{% if not loop.first %}{{ m.content }}{% endif %}",
    "{{ m.nothing }}",
    "{{ m.content | tojson }}",
)
FOOTERS = ("</s>", "</s>\n", "\n", "", "{% if loop.last %}</s>{% else %}/{% endif %}")
CHECKS = (
    "",
    "",
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}",
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "{% if m.role == 'tool' %}{{ m.content + 1 }}{% endif %}",
    "{% if loop.index > 2 %}{{ 1 // 0 }}{% endif %}",
)
OPENINGS = ("", "<s>", "{{ bos_token }}", "{% if messages[0].role != 'system' %}<s>system\nBe good.</s>{% endif %}")
CLOSINGS = ("", "{% if add_generation_prompt %}<s>assistant\n{% endif %}", "{{ messages[-1].role }}: ")
# No template, or one that renders no message.
OTHERS = (
    "{% for m in messages %}",
    "{{ 1 // 0 }}",
    "{{ messages | length }}",
    "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)


def chat_template(random: Random) -> str:
    if random.randrange(8) == 0:
        return random.choice(OTHERS)
    turn = "".join(map(random.choice, (CHECKS, HEADERS, CONTENTS, FOOTERS)))
    loop = "{% for m in messages %}" + turn + "{% endfor %}"
    return random.choice(OPENINGS) + loop + random.choice(CLOSINGS)
