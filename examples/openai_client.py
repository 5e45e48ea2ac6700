"""OpenAI's own client, pointed at safelatent: `pip install openai`, then run this file."""

import base64
import os
from pathlib import Path

from openai import OpenAI

url = os.environ.get("SAFELATENT_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SAFELATENT_API_KEY", "none"))
answer = client.images.generate(prompt="a cat on the moon", response_format="b64_json")
Path("cat.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
print("cat.png")
