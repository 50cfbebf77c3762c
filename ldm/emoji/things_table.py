"""The things the bundled model knows, as text: one line a thing.

``name | code point | synonyms | own colour | flags``. Flags: ``mass`` and ``many`` take no article and no number,
``the`` takes "the"; ``recolour`` says that the own colour may be exchanged; ``plural=...`` where the regular
plural is wrong; ``extra`` marks what a small model leaves out; ``wears=...`` names the
wearer when the picture is a face that can put on a hat or a helmet.
Code points are those of Unicode's emoji without the variation selector fe0f where it closes the sequence.
"""

ANIMALS = """
raccoon | 1f99d | raccoon face, racoon |  | wears=raccoon
fox | 1f98a | red fox, fox face |  | plural=foxes wears=fox
cat | 1f408 | housecat, house cat |  |
cat face | 1f431 | face of a cat, cat head |  | wears=cat
black cat | 1f408-200d-2b1b |  |  | extra
dog | 1f415 | hound |  |
dog face | 1f436 | face of a dog, dog head |  | wears=dog
poodle | 1f429 |  |  | extra
wolf | 1f43a | wolf face |  | plural=wolves wears=wolf
bear | 1f43b | brown bear, bear face |  | wears=bear
polar bear | 1f43b-200d-2744-fe0f | white bear |  | wears=polar bear
panda | 1f43c | panda bear, giant panda |  | wears=panda
koala | 1f428 | koala bear |  | wears=koala
lion | 1f981 | lion face |  | wears=lion
tiger | 1f405 |  |  |
tiger face | 1f42f | face of a tiger, tiger head |  | extra wears=tiger
leopard | 1f406 | cheetah |  | extra
monkey | 1f412 |  |  |
monkey face | 1f435 | face of a monkey, monkey head |  | extra wears=monkey
gorilla | 1f98d | ape |  | extra
horse | 1f40e |  |  |
horse face | 1f434 | face of a horse, horse head |  | extra wears=horse
unicorn | 1f984 |  |  | wears=unicorn
zebra | 1f993 |  |  |
deer | 1f98c |  |  | plural=deer
moose | 1face | elk |  | extra plural=moose
cow | 1f404 |  |  |
cow face | 1f42e | face of a cow, cow head |  | extra wears=cow
pig | 1f416 |  |  |
pig face | 1f437 | face of a pig, pig head |  | extra wears=pig
sheep | 1f411 | ewe |  | plural=sheep
goat | 1f410 |  |  | extra
camel | 1f42b |  |  | extra
llama | 1f999 | alpaca |  | extra
giraffe | 1f992 |  |  |
elephant | 1f418 |  |  |
rhinoceros | 1f98f | rhino |  | extra plural=rhinos
hippopotamus | 1f99b | hippo |  | extra plural=hippos
mouse | 1f401 |  |  | plural=mice
mouse face | 1f42d | face of a mouse, mouse head |  | extra wears=mouse
hamster | 1f439 | hamster face |  | wears=hamster
rabbit | 1f407 | bunny |  | plural=rabbits
rabbit face | 1f430 | bunny face, rabbit head |  | wears=rabbit
squirrel | 1f43f | chipmunk |  | extra
beaver | 1f9ab |  |  | extra
hedgehog | 1f994 |  |  | extra
bat | 1f987 |  |  | extra
sloth | 1f9a5 |  |  | extra
otter | 1f9a6 |  |  | extra
skunk | 1f9a8 |  |  | extra
kangaroo | 1f998 |  |  | extra
badger | 1f9a1 |  |  | extra
turkey | 1f983 |  |  | extra
chicken | 1f414 | hen |  | wears=chicken
rooster | 1f413 |  |  | extra
chick | 1f425 | baby chicken |  |
bird | 1f426 |  |  | recolour
penguin | 1f427 |  |  | wears=penguin
eagle | 1f985 |  |  | extra
duck | 1f986 |  |  |
swan | 1f9a2 |  |  | extra
owl | 1f989 |  |  |
flamingo | 1f9a9 |  |  |
peacock | 1f99a |  |  | extra
parrot | 1f99c |  |  |
goose | 1fabf |  |  | extra plural=geese
frog | 1f438 | frog face, toad | green | wears=frog
crocodile | 1f40a | alligator |  |
turtle | 1f422 | tortoise |  |
lizard | 1f98e |  |  | extra
snake | 1f40d |  |  |
dragon | 1f409 |  | green | recolour
dragon face | 1f432 | dragon head |  | extra wears=dragon
brontosaurus | 1f995 | long-necked dinosaur, sauropod |  | extra plural=brontosauruses
dinosaur | 1f996 | tyrannosaurus, t-rex | green | recolour
whale | 1f433 | blue whale |  |
dolphin | 1f42c |  |  | extra
seal | 1f9ad |  |  | extra
fish | 1f41f |  | blue | recolour plural=fish
tropical fish | 1f420 |  |  | extra plural=tropical fish
pufferfish | 1f421 | blowfish |  | extra plural=pufferfish
shark | 1f988 |  |  |
octopus | 1f419 |  |  | plural=octopuses
seashell | 1f41a | shell, conch |  | extra
jellyfish | 1fabc |  |  | extra plural=jellyfish
crab | 1f980 |  |  |
lobster | 1f99e |  |  | extra
squid | 1f991 |  |  | extra plural=squids
snail | 1f40c |  |  |
butterfly | 1f98b |  |  | recolour
caterpillar | 1f41b |  |  | extra
ant | 1f41c |  |  | extra
bee | 1f41d | honeybee, bumblebee |  |
ladybug | 1f41e | ladybird |  |
spider | 1f577 |  |  |
"""

FOOD = """
apple | 1f34e |  | red | recolour
pear | 1f350 |  |  |
orange | 1f34a | tangerine |  |
lemon | 1f34b |  | yellow |
banana | 1f34c |  | yellow |
watermelon | 1f349 | slice of watermelon |  | plural=watermelons
bunch of grapes | 1f347 | grapes |  | plural=bunches of grapes
strawberry | 1f353 |  | red |
pair of cherries | 1f352 | cherries |  | extra plural=pairs of cherries
peach | 1f351 |  |  | extra
pineapple | 1f34d |  |  |
mango | 1f96d |  |  | extra plural=mangoes
coconut | 1f965 |  |  | extra
kiwi | 1f95d | kiwi fruit |  | extra
avocado | 1f951 |  |  | plural=avocados
tomato | 1f345 |  | red | plural=tomatoes
carrot | 1f955 |  |  |
ear of corn | 1f33d | corn on the cob |  | plural=ears of corn
chili pepper | 1f336 | hot pepper, chili | red | recolour extra
bell pepper | 1fad1 |  | green | recolour extra
cucumber | 1f952 |  |  | extra
broccoli | 1f966 |  |  | mass
onion | 1f9c5 |  |  | extra
potato | 1f954 |  |  | extra plural=potatoes
mushroom | 1f344 | toadstool, red mushroom |  |
loaf of bread | 1f35e | bread |  | plural=loaves of bread
croissant | 1f950 |  |  |
pretzel | 1f968 |  |  | extra
stack of pancakes | 1f95e | pancakes |  | extra plural=stacks of pancakes
waffle | 1f9c7 |  |  | extra
piece of cheese | 1f9c0 | cheese, wedge of cheese |  | plural=pieces of cheese
hamburger | 1f354 | burger, cheeseburger |  |
box of french fries | 1f35f | french fries, fries |  | plural=boxes of french fries
slice of pizza | 1f355 | pizza, pizza slice |  | plural=slices of pizza
hot dog | 1f32d |  |  |
sandwich | 1f96a |  |  | extra
taco | 1f32e |  |  | extra
fried egg | 1f373 | egg in a pan |  |
egg | 1f95a |  |  |
bowl of salad | 1f957 | salad |  | extra plural=bowls of salad
box of popcorn | 1f37f | popcorn, bucket of popcorn |  | plural=boxes of popcorn
sushi | 1f363 |  |  | extra mass
ice cream cone | 1f366 | ice cream, soft ice cream |  |
donut | 1f369 | doughnut |  |
cookie | 1f36a | chocolate chip cookie |  |
birthday cake | 1f382 | cake |  |
slice of cake | 1f370 | piece of cake |  | plural=slices of cake
cupcake | 1f9c1 | muffin |  |
chocolate bar | 1f36b | bar of chocolate |  | extra
candy | 1f36c | wrapped candy |  | extra plural=candies
lollipop | 1f36d |  |  | extra
honey pot | 1f36f | pot of honey, honey jar |  | extra
glass of milk | 1f95b | milk |  | extra plural=glasses of milk
cup of coffee | 2615 | coffee, hot drink |  | plural=cups of coffee
teapot | 1fad6 |  | red | recolour
"""

VEHICLES = """
car | 1f697 |  | red | recolour
taxi | 1f695 | cab | yellow |
police car | 1f693 |  |  | extra
bus | 1f68c |  |  | plural=buses
ambulance | 1f691 |  |  | extra
fire truck | 1f692 | fire engine | red |
truck | 1f69a | delivery truck, lorry |  | recolour
tractor | 1f69c |  |  | extra
race car | 1f3ce | racing car |  | extra
motorcycle | 1f3cd | motorbike | red | recolour
scooter | 1f6f5 | motor scooter |  | extra
bicycle | 1f6b2 | bike |  |
skateboard | 1f6f9 |  |  | extra
steam train | 1f682 | locomotive, steam engine |  | extra
train | 1f686 |  |  |
airplane | 2708 | plane |  |
helicopter | 1f681 |  |  | recolour
rocket | 1f680 | spaceship, space rocket |  |
ufo | 1f6f8 | flying saucer |  |
sailboat | 26f5 | sailing boat |  |
ship | 1f6a2 |  |  |
satellite | 1f6f0 |  |  | extra
"""

NATURE = """
pine tree | 1f332 | evergreen tree, fir tree | green |
tree | 1f333 | leafy tree |  |
palm tree | 1f334 |  |  |
cactus | 1f335 |  | green | plural=cacti
christmas tree | 1f384 |  |  |
rose | 1f339 |  | red | recolour
tulip | 1f337 |  | pink | recolour extra
sunflower | 1f33b |  |  |
cherry blossom | 1f338 |  |  | extra
bouquet of flowers | 1f490 | bouquet, flowers |  | extra plural=bouquets of flowers
four leaf clover | 1f340 | clover |  | extra
maple leaf | 1f341 | autumn leaf |  | extra plural=maple leaves
potted plant | 1fab4 | house plant |  | extra
mountain | 1f3d4 | snowy mountain |  |
volcano | 1f30b |  |  | plural=volcanoes
desert island | 1f3dd | tropical island, island |  | extra
rainbow | 1f308 |  |  |
cloud | 2601 |  |  |
rain cloud | 1f327 | rainy cloud |  | extra
sun | 2600 |  |  | the
sun face | 1f31e | sun with a face, smiling sun |  | extra
crescent moon | 1f319 | moon |  |
full moon | 1f315 |  |  | extra
star | 2b50 |  | yellow | recolour
planet with rings | 1fa90 | saturn, ringed planet |  | plural=planets with rings
earth | 1f30d | globe, planet earth |  | the
comet | 2604 |  |  | extra
snowflake | 2744 |  |  |
lightning bolt | 26a1 |  |  |
fire | 1f525 | flame |  | plural=fires
wave | 1f30a | ocean wave |  | extra
water drop | 1f4a7 | drop of water |  | extra
tornado | 1f32a |  |  | extra plural=tornadoes
"""

OBJECTS = """
top hat | 1f3a9 | black hat |  |
crown | 1f451 | golden crown |  |
sunglasses | 1f576 | dark glasses |  | many
glasses | 1f453 | eyeglasses |  | extra many
cap | 1f9e2 | baseball cap | blue | recolour
graduation cap | 1f393 | mortarboard |  |
t-shirt | 1f455 | shirt |  | recolour
dress | 1f457 |  |  | extra plural=dresses
backpack | 1f392 | school bag | red | recolour
sneaker | 1f45f | running shoe |  | extra
scarf | 1f9e3 |  | red | recolour extra plural=scarves
umbrella | 2602 |  |  | recolour
heart | 2764 | love heart | red | recolour
diamond | 1f48e | gem, gemstone | blue | recolour
ring | 1f48d | diamond ring |  | extra
balloon | 1f388 |  | red | recolour
gift | 1f381 | present, wrapped gift |  |
teddy bear | 1f9f8 | stuffed bear |  |
soccer ball | 26bd |  |  |
basketball | 1f3c0 |  | orange |
tennis racket | 1f3be | tennis racquet |  | extra
trophy | 1f3c6 | golden trophy |  | plural=trophies
kite | 1fa81 |  |  | extra
guitar | 1f3b8 |  |  | recolour
violin | 1f3bb |  |  | extra
trumpet | 1f3ba |  |  | extra
drum | 1f941 |  |  |
microphone | 1f3a4 |  |  | extra
headphones | 1f3a7 | |  | extra many
camera | 1f4f7 |  |  |
television | 1f4fa | tv |  | extra
laptop | 1f4bb | computer, laptop computer |  |
telephone | 260e | phone | red | recolour extra
light bulb | 1f4a1 | lightbulb |  |
candle | 1f56f |  |  | extra
book | 1f4d5 | closed book | red | recolour
pencil | 270f |  |  |
paintbrush | 1f58c |  |  | extra
envelope | 2709 | letter |  | extra
clock | 23f0 | alarm clock |  |
key | 1f511 |  |  |
lock | 1f512 | padlock |  | extra
bell | 1f514 | golden bell |  | extra
hammer | 1f528 |  |  | extra
magnet | 1f9f2 |  |  | extra
telescope | 1f52d |  |  | extra
magnifying glass | 1f50d |  |  | extra
crystal ball | 1f52e |  |  |
magic wand | 1fa84 |  |  | extra
chair | 1fa91 |  |  |
bed | 1f6cf |  |  | extra
door | 1f6aa |  |  | extra
bucket | 1faa3 |  | blue | recolour extra
broom | 1f9f9 |  |  | extra
anchor | 2693 |  |  | recolour extra
pumpkin | 1f383 | jack-o'-lantern, halloween pumpkin |  |
"""

PEOPLE = """
astronaut | 1f9d1-200d-1f680 | astronaut in a space suit |  |
robot | 1f916 | robot face |  |
alien | 1f47d | green alien, extraterrestrial |  |
ghost | 1f47b |  |  |
wizard | 1f9d9-200d-2642-fe0f | mage, old wizard |  |
witch | 1f9d9-200d-2640-fe0f | sorceress |  | extra
snowman | 26c4 |  |  | plural=snowmen
clown | 1f921 | clown face |  |
ninja | 1f977 |  |  |
mermaid | 1f9dc-200d-2640-fe0f |  |  |
fairy | 1f9da-200d-2640-fe0f |  |  | extra plural=fairies
vampire | 1f9db-200d-2642-fe0f |  |  | extra
zombie | 1f9df-200d-2642-fe0f |  |  | extra
superhero | 1f9b8-200d-2642-fe0f |  |  | plural=superheroes
santa claus | 1f385 | santa, father christmas |  | many
princess | 1f478 |  |  | plural=princesses
prince | 1f934 |  |  | extra
detective | 1f575 |  |  | extra
chef | 1f468-200d-1f373 | cook |  |
firefighter | 1f468-200d-1f692 | fireman |  | extra
farmer | 1f469-200d-1f33e |  |  | extra
scientist | 1f469-200d-1f52c |  |  | extra
baby | 1f476 | baby face |  | extra plural=babies
smiley | 1f600 | smiley face, grinning face |  |
skull | 1f480 |  |  |
"""

BUILDINGS = """
house | 1f3e0 | home |  |
castle | 1f3f0 |  |  |
skyscraper | 1f3e2 | office building |  | extra
tent | 26fa |  |  |
church | 26ea |  |  | extra plural=churches
factory | 1f3ed |  |  | extra plural=factories
hut | 1f6d6 |  |  | extra
circus tent | 1f3aa |  |  | extra
ferris wheel | 1f3a1 |  |  | extra
fountain | 26f2 |  |  | extra
"""

CATEGORIES = {
    "animal": ANIMALS,
    "food": FOOD,
    "vehicle": VEHICLES,
    "nature": NATURE,
    "object": OBJECTS,
    "person": PEOPLE,
    "building": BUILDINGS,
}
