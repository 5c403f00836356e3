"""Unreliable server: a script whose first replies are delayed, rejected or broken, in every way that a server knows."""

import asyncio

from scripted_server import Asked, Reply, Script, error


def unreliable(script: Script) -> Script:
    """Return a script that answers some first requests late or with an error, by their prompt, and then as `script`."""

    async def reply(asked: Asked) -> Reply:
        kind = sum(map(ord, asked.prompt)) % 11
        if asked.times == 0:
            match kind:
                case 1:
                    return error(429, "slow down", headers={"retry-after-ms": "5"})
                case 2:
                    return error(500, "oops")
                case 3:
                    return Reply(drop=40, body={"choices": []})
                case 4:
                    return Reply(body=b"<html>not what you asked for</html>")
                case 5:
                    await asyncio.sleep(0.05)
                case 6:
                    return error(503, "loading")
        return await script(asked)

    return reply
