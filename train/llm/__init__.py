"""Requests to language models on OpenAI-compatible servers: many at a time, none asked twice.

The path of a request:

    client.py        ask one request: journal -> slot -> server -> journal      (journal.py, concurrency.py)
    server.py        send it once; return an Answer or a ServerError            (request.py, request_body.py)
    connection/      address, API key, TLS, HTTP connections, redaction of secrets, streams
    replies.py       the answer in a response                                   (finish_reasons.py)
    server_errors.py the meaning of an error response; refusals.py: the setting that it is about
    failure_policy.py  when errors end a request or the run                     (diagnosis.py, failures.py)
    reasoning/       the answer without reasoning and control tokens            (empty_answers.py, yes_or_no.py)
    judgement.py     a question to a judge, asked again until a reply holds a verdict

Around it: startup_check.py (before a run), ordered_map.py and progress.py (rows), system_role.py, options.py.
"""
