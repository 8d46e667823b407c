"""Word pools and sentence shapes of the four worlds that benchmark texts are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """shapes: format strings over the pools' names and {n}; pools: slot -> phrases."""

    name: str
    shapes: tuple[str, ...]
    pools: dict[str, tuple[str, ...]]


def _pool(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


MOUNTAIN = Theme(
    "mountain hut",
    (
        "{when}, {who} {did} {where}, {why}.",
        "{who} {did} {where} {when}, and {then}.",
        "{weather}, so {who} {did} {where}.",
        "There were {n} {things} {where}, {detail}.",
        "{when} it turned out that {who2} had taken the {things}, {why}.",
        "Whoever comes {where} will find {things}, {detail}.",
        "{weather}, and {then}.",
        "For {n} days {who} {did} nothing else, {why}.",
    ),
    {
        "when": _pool(
            "early in the morning|towards evening|after the second snowfall|on the last Sunday of "
            "the month|before anyone else was awake|when the fog had lifted|a week later|in the "
            "middle of the thaw|shortly after noon|during the long rain|at first light|on the "
            "coldest night of the winter|once the path was clear|by the time the lamps were lit"
        ),
        "who": _pool(
            "the guide|a party from the valley|the cook|two students of geology|the woodcutter|"
            "an elderly couple|the postman's sister|the mule driver|a botanist with a bad knee|"
            "the carpenter and his nephew|three surveyors|the doctor|a silent man from the coast|"
            "the schoolchildren|the weather observer"
        ),
        "who2": _pool(
            "the night porter|one of the climbers|the priest|a careless visitor|the new shepherd|"
            "the tinsmith|somebody from the other side of the pass|the youngest of the sisters"
        ),
        "did": _pool(
            "repaired the fence|looked for the lost goats|stacked firewood|measured the depth of "
            "the snow|waited for the supply sledge|drew a map of the gullies|counted the marmots|"
            "boiled coffee|hung the blankets out to dry|quarrelled about the route|marked the "
            "trail with red paint|gathered bilberries|slept through the storm|mended the stove|"
            "read old newspapers aloud|carved spoons"
        ),
        "where": _pool(
            "below the north face|beside the upper lake|behind the woodshed|on the old mule track|"
            "at the edge of the glacier|near the collapsed bridge|in the meadow above the chapel|"
            "under the overhanging rock|along the ridge|in the lee of the hut|at the second "
            "cairn|where the two streams meet|among the dwarf pines|on the saddle"
        ),
        "why": _pool(
            "because the rope had frozen stiff|as the rules of the hut demand|although nobody had "
            "asked for it|since the barometer was falling|for want of anything better to do|"
            "to the great surprise of the others|without saying a word|because the flour was "
            "damp|as had been agreed in the autumn|in spite of a toothache|since the bell "
            "could not be heard there|so that the tracks would not be lost"
        ),
        "then": _pool(
            "the evening was spent indoors|nobody mentioned it again|the kettle was put back on|"
            "the lanterns had to be filled twice|the mules refused to move|everyone went down a "
            "day early|the visitors' book was left open on the table|the soup was thinner than "
            "usual|a song was heard from the valley|the shutters stayed closed till noon"
        ),
        "weather": _pool(
            "the wind had gone round to the west|hail lay on the path like spilled peas|the clouds "
            "hung halfway down the slope|it was too warm for the season|the air smelled of snow|"
            "a thin sun stood over the ridge|mist filled the valley to the brim|the stream had "
            "risen overnight|the stars were unusually bright|thunder rolled from wall to wall"
        ),
        "things": _pool(
            "iron pegs|old skis|sacks of barley|coils of rope|tin plates|goat bells|wooden stakes|"
            "woollen socks|broken lanterns|glass jars|maps with torn corners|bundles of hay"
        ),
        "detail": _pool(
            "most of them older than the hut|all of them carefully numbered|some of which had "
            "never been used|wrapped in oilcloth|just as the last party had left them|half hidden "
            "under the snow|tied together with blue string|of which no one knew the owner"
        ),
    },
)

WORKSHOP = Theme(
    "workshop",
    (
        "{when} {who} {did} {what}, {how}.",
        "{who} {did} {what} {how}, but {but}.",
        "The order book mentions {n} {goods} {forwhom}, {note}.",
        "{what} was {state} {when}, and {but}.",
        "{goods} were made {forwhom} {when}, {note}.",
        "As {who} used to say, {saying}.",
        "It took {n} hours until {who} {did} {what}, {how}.",
        "{saying}, and so {who} {did} {what}.",
    ),
    {
        "when": _pool(
            "in the first week of spring|on rainy afternoons|between two deliveries|after the "
            "glue had set|before the fair|in the year of the new roof|when the kiln was cold|"
            "late on a Saturday|as soon as the light was good enough|during the stocktaking|"
            "just before closing|at the beginning of the long strike"
        ),
        "who": _pool(
            "the master|the oldest journeyman|a new apprentice|the bookkeeper|the saddler from "
            "next door|the foreman's brother|the varnisher|a travelling salesman|the woman who "
            "kept the stores|the wheelwright|both of the twins|the night watchman"
        ),
        "did": _pool(
            "sharpened|took apart|weighed|polished|sketched|hid|traded away|repainted|"
            "carried upstairs|examined|wrapped in felt|measured once more|set aside|rebuilt"
        ),
        "what": _pool(
            "the big lathe|a set of chisels|the leather bellows|a cracked mould|the drawing of "
            "the staircase|a drawer full of hinges|the brass scales|the second-best saw|a "
            "walnut plank|the model of the windmill|an unfinished chair|the pattern for a "
            "church door|a basket of offcuts|the grindstone"
        ),
        "how": _pool(
            "with great patience|against the advice of everyone|by the light of a candle|"
            "whistling through his teeth|as though there were no hurry|with the help of a "
            "neighbour|in exchange for a ham|using nothing but a file|without a drawing|"
            "for the third time that month|in complete silence|after a short prayer"
        ),
        "but": _pool(
            "the customer never came|the measure was a thumb too short|nobody could tell the "
            "difference|the cat had slept on it|the varnish stayed sticky for weeks|it was sold "
            "the very next day|the price had been agreed beforehand|there was no more oak to be "
            "had|the accounts were none the better for it|a better way was found later"
        ),
        "goods": _pool(
            "beech stools|window frames|butter churns|picture frames|rolling pins|ladders|oak "
            "barrels|sledges|tool handles|music stands|coat pegs|cradles|birdcages|tabletops"
        ),
        "forwhom": _pool(
            "for the school|for a widow in the upper town|for the railway|for export|for the "
            "hospital kitchen|for a theatre company|for the tax office|for an uncle in America|"
            "for the swimming club|for a hotel that was never opened"
        ),
        "note": _pool(
            "paid in three parts|delivered by cart|with a note of thanks in the margin|which were "
            "later returned|at a loss, as it seems|in the usual quality|stained to look like "
            "mahogany|with one to spare|all by the same hand|on condition of secrecy"
        ),
        "state": _pool(
            "oiled and put back|found to be warped|lent to the brewery|stolen and recovered|"
            "covered with a sheet|declared unfit for use|given a second coat|nailed to the wall"
        ),
        "saying": _pool(
            "wood remembers how it grew|a dull blade is a rude guest|measure with the eye and cut "
            "with the hand|nothing dries faster for being watched|cheap nails cost the most|the "
            "joint that shows is the honest one|one should never argue with a knot|sawdust is "
            "also a product|the last stroke decides|a good bench outlives three masters"
        ),
    },
)

MUSEUM = Theme(
    "museum",
    (
        "{room} holds {n} {objects} {origin}, {fact}.",
        "{visitors} like to stop in front of {piece}, {reason}.",
        "{piece} was {story} {time}, {fact}.",
        "{time} {staff} moved {piece} into {room}, {reason}.",
        "Of the {objects} {origin} only {n} are on show, {fact}.",
        "{staff} noticed {time} that {piece} had been {story}.",
        "The label of {piece} is wrong, as {visitors} have pointed out, {reason}.",
        "{visitors} often ask about {objects} {origin}, and {staff} then point to {piece}.",
    ),
    {
        "room": _pool(
            "the east gallery|the long corridor|the cellar|the reading room|the blue cabinet|the "
            "glass pavilion|the attic|the room above the entrance|the former chapel|the annexe|"
            "the hall of clocks|the last room on the left"
        ),
        "objects": _pool(
            "porcelain cups|bronze coins|embroidered gloves|wax seals|astrolabes|lace collars|"
            "clay lamps|snuff boxes|ivory combs|printed fans|pewter jugs|masks|seed pearls|"
            "silk slippers|tiles|surgical instruments"
        ),
        "origin": _pool(
            "from the southern provinces|of unknown origin|from a sunken merchantman|given by a "
            "retired consul|from the estate of a brewer|bought at a single auction|dug up under "
            "the market hall|of very uneven quality|from the time of the regency|once thought "
            "to be forged"
        ),
        "fact": _pool(
            "none of them signed|most of them in poor condition|which is more than the catalogue "
            "says|as a recent inventory has shown|although the insurers objected|by the same "
            "workshop|if the stamps can be trusted|to judge by the dust|and admired by experts|"
            "in the original boxes|with two exceptions"
        ),
        "visitors": _pool(
            "children|school classes|visitors from abroad|retired sailors|art students|newly "
            "married couples|collectors|people who have come in out of the rain|journalists|"
            "members of the weavers' guild"
        ),
        "piece": _pool(
            "the marble dog|the portrait of a tax collector|the travelling desk|the carved door|"
            "the tapestry with the hunters|the musical box|the broken globe|the silver stag|the "
            "model of the cathedral|the landscape with cows|the red lacquer screen|the suit of "
            "armour|the mosaic floor|the harpsichord|the bust of an unknown lady"
        ),
        "reason": _pool(
            "because it is cool there in summer|for reasons that are hard to explain|since the "
            "light falls on it from the side|as one can hear it ticking|perhaps because of the "
            "frame|in order to make room for the heating|out of simple curiosity|because the "
            "bench is comfortable|since the keeper tells a good story about it|as the guide "
            "books recommend|without touching anything, one hopes"
        ),
        "story": _pool(
            "cleaned with bread|mistaken for a copy|hung upside down|lent to a bank|restored by "
            "two sisters|hidden in a hayloft|cut into three parts|shown to an emperor|offered as "
            "security for a loan|found in a henhouse|repaired with fish glue|photographed by "
            "night|left out in the rain"
        ),
        "time": _pool(
            "before the great exhibition|during the siege|some forty years ago|in the days of the "
            "first director|at the end of the season|after the flood|without any announcement|"
            "in the course of the rebuilding|on a Monday, when the house is closed|last winter"
        ),
        "staff": _pool(
            "the curators|the two attendants|the restorers|volunteers|the director's assistants|"
            "the cleaners|the night guards|the librarians|the trustees|the framers"
        ),
    },
)

RIVER = Theme(
    "river survey",
    (
        "{when} the boat lay {where}, where {crew} {did}, {note}.",
        "{crew} {did} {where} and {did2}.",
        "{animals} were seen {where} {when}, {note}.",
        "The current {where} was {flow}, {note}.",
        "{crew} {did2} {when}, since the current was {flow}.",
        "{n} {samples} were taken {where}, {note}.",
        "{villagers} came {when} to look on and told {crew} that {claim}.",
        "According to {villagers}, {claim}, {note}.",
    ),
    {
        "when": _pool(
            "at dawn|on the fourth morning|after two days of rain|when the water was lowest|"
            "towards the end of the dry season|at dusk|while the motor was being repaired|in the "
            "hottest part of the day|on the way back|during the night watch|at high water|"
            "before the mist had gone"
        ),
        "where": _pool(
            "at the lower rapids|below the sawmill|in the reed belt|off the sandy point|under the "
            "railway bridge|at the mouth of the canal|by the willow island|in the third bend|"
            "beside the brickworks|at the old ford|opposite the monastery|in the backwater|"
            "near the pumping station|above the weir"
        ),
        "crew": _pool(
            "the surveyors|the helmsman|both biologists|the trainee|the cook|the whole crew|the "
            "engineer|the photographer|the leader of the expedition|the two divers|the interpreter"
        ),
        "did": _pool(
            "lowered the net|took soundings|mended the awning|labelled bottles|put out the "
            "anchor twice|compared the charts|recorded the temperature|dried the tents|caught a "
            "pike|cleaned the lenses|lost an oar|tested the new pump"
        ),
        "did2": _pool(
            "wrote up the notes|turned back early|cooked rice for everyone|slept on deck|"
            "argued about the scale of the map|changed the batteries|rowed ashore for milk|"
            "listened to the frogs|postponed the dive|covered the instruments|patched the dinghy"
        ),
        "animals": _pool(
            "otters|grey herons|a pair of kingfishers|water snakes|swarms of mayflies|young "
            "sturgeon|bats|beavers|cormorants|freshwater crabs|wild geese|a lone pelican"
        ),
        "note": _pool(
            "as the log confirms|although this had been doubted|much to the cook's delight|"
            "which agrees with the older reports|for the first time in years|at a depth of two "
            "fathoms|in spite of the noise|as far as could be made out|with the smaller of the "
            "instruments|except on the western bank|and the same again an hour later|which "
            "nobody could explain"
        ),
        "flow": _pool(
            "hardly to be felt|stronger than expected|brown with silt|reversed by the tide|split "
            "in two by a gravel bank|too fast for the dinghy|smooth as oil|colder than the air by "
            "far|full of drifting branches|slow and rather warm"
        ),
        "samples": _pool(
            "water samples|cores of mud|pressed plants|jars of plankton|scales of fish|"
            "photographs|pieces of driftwood|shells|sound recordings|stones with moss"
        ),
        "villagers": _pool(
            "some fishermen|a farmer with an ox cart|the women at the washing place|the keeper of "
            "the lock|several boys on a raft|an old ferryman|a monk|the owners of the sawmill|the "
            "village teacher|a bargeman's widow"
        ),
        "claim": _pool(
            "the fish had moved upstream|the island used to be twice as large|there had once been "
            "a bridge of boats|the water tasted of iron in autumn|no one swam beyond the poplars|"
            "the bank had been cut back by floods|the mill would soon be closed|eels could walk "
            "across a meadow|the ice had carried off the jetty|the bells could be heard under "
            "water|the old channel was safer"
        ),
    },
)

THEMES = (MOUNTAIN, WORKSHOP, MUSEUM, RIVER)
