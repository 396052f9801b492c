"""Support tickets of six classes, written by templates.

Each ticket has one sentence that says what it is about, and others that mention what other tickets are about.
Templates are split between training and test, so that none of the test's sentences was trained on.
"""

import json
import random
from pathlib import Path

CLASSES = ("billing", "delivery", "login", "defect", "cancellation", "suggestion")

# The first eight of each are trained on, the last four tested.
SUBJECTS = {
    "billing": (
        "I was charged {n} euros twice for the same {thing}.",
        "The total on my invoice does not match the price of the {thing}.",
        "Why does my card statement show {n} euros that I never agreed to?",
        "You took the monthly fee on {day} even though I had already paid it.",
        "The discount code was accepted, but you billed me the full amount.",
        "Please send me a receipt with our VAT number for the {thing}.",
        "There is a fee of {n} euros on my bill that nobody can explain.",
        "I paid by bank transfer on {day}, and you still send me payment reminders.",
        "My credit card was debited again this {day} for the {thing}.",
        "The sum you collected is {n} euros higher than what we had agreed on.",
        "I would like to know what the extra {n} euros on my statement are for.",
        "The tax on the {thing} was calculated for the wrong country.",
    ),
    "delivery": (
        "My {thing} should have arrived on {day}, and it is still not here.",
        "The tracking page has not changed for {n} days.",
        "The courier left the parcel with a neighbour whom nobody knows.",
        "Can the {thing} be sent to my office instead of my home?",
        "The package was returned to you although I was at home all {day}.",
        "Half of the shipment is missing; only the {thing} was in the box.",
        "The driver wrote that he rang the bell, but nobody came on {day}.",
        "When will you ship the {thing} that I ordered {n} days ago?",
        "I have been waiting for the {thing} for {n} days now.",
        "The depot says that my parcel is lost.",
        "You sent the {thing} to the address where I used to live.",
        "According to the carrier, the box never left your warehouse.",
    ),
    "login": (
        "I cannot sign in any more since {day}.",
        "The password reset mail never reaches me.",
        "The site says that my user name does not exist.",
        "The code that you text me is rejected every time.",
        "My account has been locked after {n} attempts.",
        "I lost the phone that I confirm my identity with, and now I am locked out.",
        "Each time I enter my password, I land on the start page again.",
        "Somebody changed the mail address of my account, and I have no access.",
        "Your page does not accept my credentials any longer.",
        "I have forgotten my passphrase, and the link for a new one has expired.",
        "Since {day} the authenticator app shows codes that your site refuses.",
        "I get thrown out right after entering my user name.",
    ),
    "defect": (
        "The {thing} stopped working after {n} days.",
        "The display of my {thing} stays black.",
        "There is a crack in the housing of the {thing}.",
        "The app crashes whenever I connect the {thing}.",
        "The battery of the {thing} is empty after {n} minutes.",
        "My {thing} makes a loud noise and then switches itself off.",
        "One of the buttons on the {thing} has come off.",
        "Since the last update the {thing} loses its connection all the time.",
        "The {thing} does not turn on, whatever I do.",
        "Smoke came out of the {thing} on {day}.",
        "The {thing} freezes {n} times a day and has to be restarted.",
        "The charging port of the {thing} is loose.",
    ),
    "cancellation": (
        "Please end my subscription at the end of the month.",
        "I no longer want the {thing} and withdraw from the purchase.",
        "Close my account and delete my data, please.",
        "I want to cancel the order that I placed on {day}.",
        "Kindly stop the renewal of my plan.",
        "We are terminating our contract with a notice of {n} days.",
        "How do I get out of the membership before it is extended?",
        "I have changed my mind about the {thing}; do not process my order.",
        "I would like to leave the service by {day}.",
        "Take the {thing} off my order, since I do not need it any more.",
        "Consider this letter my notice of termination.",
        "Do not prolong my plan; I am not going to use it.",
    ),
    "suggestion": (
        "It would be great if the {thing} came in other colours.",
        "Have you thought about a dark mode for the app?",
        "I wish that the {thing} could be controlled by voice.",
        "Please consider adding a calendar view.",
        "A version of the {thing} for left-handed people would be nice.",
        "Could you offer the {thing} in a smaller size as well?",
        "You should let us export our lists to a spreadsheet.",
        "My idea is a family plan for {n} people.",
        "Why not sell spare parts for the {thing}?",
        "I would love to see a widget for the home screen.",
        "Your shop would be better with a filter by material.",
        "It might help others if the {thing} had a larger handle.",
    ),
}  # fmt: skip

# The first three of each are trained on, the last two tested.
ASIDES = {
    "billing": (
        "The invoice itself is correct.",
        "I have paid everything, so this is not about money.",
        "The price was fine with me.",
        "My payment went through without trouble.",
        "I have nothing to say about the bill.",
    ),
    "delivery": (
        "The parcel came on time, by the way.",
        "Shipping was quick, as always.",
        "The courier was friendly.",
        "The package arrived in good shape.",
        "Your delivery service did well.",
    ),
    "login": (
        "I can sign in without problems.",
        "I have changed my password, as you advised.",
        "My account works.",
        "Logging in is not the issue.",
        "The new password does its job.",
    ),
    "defect": (
        "The {thing} itself works well.",
        "Nothing is broken.",
        "The fault that I reported last year has been repaired.",
        "The device runs without a hitch.",
        "The {thing} has never failed me.",
    ),
    "cancellation": (
        "I do not want to cancel anything.",
        "I will stay with you in any case.",
        "My colleague ended her subscription last year.",
        "This is not a reason for me to leave.",
        "I intend to keep my plan.",
    ),
    "suggestion": (
        "I liked the feature that you added in spring.",
        "You took up my last idea, thank you.",
        "The new colours are lovely.",
        "I have no wishes beyond that.",
        "The dark mode is a good addition.",
    ),
}  # fmt: skip

OPENINGS = ("Hello,", "Dear team,", "Good morning.", "Hi there,", "")
CLOSINGS = ("Thanks in advance.", "Kind regards", "Please get back to me by {day}.", "")
THINGS = ("lamp", "headset", "kettle", "keyboard", "bicycle light", "speaker", "drill", "monitor")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


def write_tickets(folder: Path, seed: int) -> tuple[str, str]:
    """Write 480 rows for training and 240 for the test; returns the names of their files."""
    draw = random.Random(seed)
    parts = {"train": (slice(0, 8), slice(0, 3), 10), "test": (slice(8, 12), slice(3, 5), 10)}
    files: list[str] = []
    for name, (subjects, asides, copies) in parts.items():
        rows = [
            {"text": _ticket(draw, subject, label, asides), "label": label}
            for label in CLASSES
            for subject in SUBJECTS[label][subjects]
            for _ in range(copies)
        ]
        draw.shuffle(rows)
        files.append(str(folder / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return files[0], files[1]


def _ticket(draw: random.Random, subject: str, label: str, asides: slice) -> str:
    """The subject among asides on two other classes."""
    others = draw.sample([name for name in CLASSES if name != label], 2)
    body = [subject, *(draw.choice(ASIDES[name][asides]) for name in others)]
    draw.shuffle(body)
    sentences = [draw.choice(OPENINGS), *body, draw.choice(CLOSINGS)]
    return " ".join(filter(None, sentences)).format(
        thing=draw.choice(THINGS), day=draw.choice(DAYS), n=draw.randint(2, 30)
    )
