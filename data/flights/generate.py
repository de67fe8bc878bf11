"""Questions of air travellers, with a label for each word and an intent for each question: made from a grammar.

    python prepare.py flights                    into data/flights, ready for training
    python data/flights/generate.py              prints the questions with their labels

The labels have the names that the ATIS corpus gave them (Hemphill et al. 1990); all questions are made up here. A
template is a question with slots: "flights from <fromloc.city_name> to <toloc.city_name>". Its words in front, such as
"show me", and at its end, such as "please", do not belong to it. A hash decides whether a template is for training,
validation or test. It also decides whether a value of an open list, such as a city, may occur in all parts, or in
validation alone, or in test alone. So a held-out question has a held-out template, and one in ten of its cities is new.
"""

import random
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sources.labelled import WORD
from sources.pairs import split_of

SEED = 0
QUESTIONS = 4  # for each template
WRITTEN = 0.25  # share of questions with capitals and a mark at the end; the others are as speech is written down
HELD_OUT = 0.1  # share of templates and of values for validation, and again for test
ASKING = "what which how is are do does can could where when who"  # a question's first word; others are requests


def split(text):
    """The parts of a text between its | marks."""
    return [" ".join(part.split()) for part in text.split("|")]


# ----------------------------------------------------------------------------------------------------------------------
# Values of slots: of <toloc.city_name> those of city_name

OPEN = {  # a value is for all parts, or for validation or test alone
    "city_name": """
        Boston | Denver | Atlanta | Dallas | Philadelphia | Pittsburgh | Baltimore | Oakland | San Francisco
        | Chicago | Detroit | Houston | Memphis | Cleveland | Cincinnati | Columbus | Indianapolis | Milwaukee
        | Minneapolis | Saint Paul | Saint Louis | Kansas City | Salt Lake City | Las Vegas | Los Angeles
        | San Diego | San Jose | Seattle | Portland | Phoenix | Tucson | Albuquerque | El Paso | San Antonio
        | Austin | New Orleans | Baton Rouge | Nashville | Louisville | Charlotte | Raleigh | Miami | Orlando
        | Tampa | Jacksonville | Fort Lauderdale | West Palm Beach | Key West | Savannah | Charleston | Richmond
        | Norfolk | Washington | New York | Newark | Buffalo | Rochester | Syracuse | Albany | Hartford
        | Providence | Burlington | Manchester | Bangor | Montreal | Toronto | Ottawa | Quebec City | Halifax
        | Winnipeg | Calgary | Edmonton | Vancouver | Victoria | Anchorage | Fairbanks | Juneau | Honolulu | Hilo
        | Boise | Spokane | Missoula | Billings | Cheyenne | Rapid City | Sioux Falls | Fargo | Bismarck | Omaha
        | Lincoln | Des Moines | Cedar Rapids | Wichita | Tulsa | Oklahoma City | Little Rock | Fort Smith
        | Shreveport | Jackson | Mobile | Birmingham | Huntsville | Montgomery | Chattanooga | Knoxville
        | Lexington | Evansville | Fort Wayne | South Bend | Grand Rapids | Lansing | Green Bay | Madison | Duluth
        | Peoria | Springfield | Dayton | Toledo | Akron | Erie | Scranton | Harrisburg | Allentown
        | Atlantic City | Wilmington | Roanoke | Greensboro | Asheville | Myrtle Beach | Pensacola | Tallahassee
        | Sarasota | Fort Myers | Gainesville | Daytona Beach | Lubbock | Amarillo | Midland | Corpus Christi
        | Laredo | Brownsville | Santa Fe | Flagstaff | Reno | Carson City | Sacramento | Fresno | Bakersfield
        | Santa Barbara | Long Beach | Ontario | Burbank | Palm Springs | Eugene | Medford | Tacoma | Bellingham
        | Yakima | Colorado Springs | Grand Junction | Aspen | Provo | Mexico City | Guadalajara | Cancun
        | Monterrey | Tijuana | Havana | San Juan | Kingston | Nassau | Panama City | Bogota | Lima | Quito
        | Santiago | Buenos Aires | Rio de Janeiro | Sao Paulo | Caracas | London | Dublin | Edinburgh | Paris
        | Lyon | Nice | Madrid | Barcelona | Lisbon | Porto | Rome | Milan | Turin | Venice | Naples | Palermo
        | Geneva | Zurich | Vienna | Salzburg | Munich | Frankfurt | Berlin | Hamburg | Cologne | Brussels
        | Amsterdam | Rotterdam | Copenhagen | Oslo | Bergen | Stockholm | Helsinki | Reykjavik | Warsaw | Krakow
        | Prague | Budapest | Athens | Istanbul | Ankara | Cairo | Tel Aviv | Dubai | Doha | Nairobi | Cape Town
        | Lagos | Casablanca | Tunis | Mumbai | New Delhi | Bangkok | Singapore | Hong Kong | Kuala Lumpur
        | Jakarta | Manila | Taipei | Tokyo | Osaka | Seoul | Beijing | Shanghai | Sydney | Melbourne | Perth
        | Auckland | Wellington""",
    "state_name": """
        Alabama | Alaska | Arizona | Arkansas | California | Colorado | Connecticut | Delaware | Florida | Georgia
        | Hawaii | Idaho | Illinois | Indiana | Iowa | Kansas | Kentucky | Louisiana | Maine | Maryland
        | Massachusetts | Michigan | Minnesota | Mississippi | Missouri | Montana | Nebraska | Nevada
        | New Hampshire | New Jersey | New Mexico | North Carolina | North Dakota | Ohio | Oregon | Pennsylvania
        | Rhode Island | South Carolina | South Dakota | Tennessee | Texas | Utah | Vermont | Virginia
        | West Virginia | Wisconsin | Wyoming""",
    "state_code": """
        AL | AK | AZ | CA | CO | DC | FL | GA | IL | LA | MA | MD | MI | MN | MO | NC | NJ | NV | NY | OH | OK
        | PA | TN | TX | UT | VA | WA | WI""",
    "country_name": """
        Canada | Mexico | Cuba | Jamaica | Brazil | Peru | Chile | Argentina | England | Ireland | France | Spain
        | Portugal | Italy | Switzerland | Austria | Germany | Belgium | Denmark | Norway | Sweden | Finland
        | Poland | Greece | Turkey | Egypt | Kenya | India | Thailand | Japan | China | Australia | New Zealand
        | South Africa | Costa Rica""",
    "airline_name": """
        American Airlines | American | Delta | Delta Air Lines | United | United Airlines | Continental
        | Continental Airlines | Northwest | Northwest Airlines | US Air | TWA | Eastern | Eastern Airlines
        | Midwest Express | America West | Southwest | Southwest Airlines | Alaska Airlines | Hawaiian Airlines
        | Canadian Airlines | Air Canada | Lufthansa | British Airways | Virgin Atlantic | Air France | Alitalia
        | Iberia | Swiss | KLM | Sabena | Austrian Airlines | Finnair | Icelandair | Aer Lingus | Ryanair
        | Easyjet | Qantas | Air New Zealand | Singapore Airlines | Cathay Pacific | Thai Airways | Japan Airlines
        | All Nippon Airways | Korean Air | Air India | Emirates | Qatar Airways | Turkish Airlines | Egyptair
        | Kenya Airways | Ethiopian Airlines | Aeromexico | Avianca | Copa Airlines | Frontier | Frontier Airlines
        | Spirit | Spirit Airlines | Jetblue | Tower Air | Pan Am | Piedmont | Braniff | World Airways
        | Sun Country | Allegiant""",
    "airline_code": """
        AA | DL | UA | CO | NW | TW | EA | HP | WN | AS | AC | LH | BA | VS | AF | AZ | IB | LX | KL | QF | NZ
        | SQ | CX | JL | NH | KE | EK | QR | TK | B6 | F9 | NK | YX | US""",
    "airport_name": """
        Logan Airport | Logan International Airport | Love Field | Stapleton Airport | Stapleton International
        | Hartsfield | Hartsfield Airport | General Mitchell International
        | General Mitchell International Airport | La Guardia | La Guardia Airport | Kennedy Airport
        | John F Kennedy Airport | Newark Airport | Newark International | Dulles | Dulles Airport
        | Dulles International | National Airport | Reagan National | O'Hare | O'Hare Airport
        | O'Hare International Airport | Midway | Midway Airport | Houston Intercontinental | Hobby Airport
        | Lambert Field | McCarran Airport | McCarran International | Sky Harbor | Sky Harbor Airport
        | Lindbergh Field | John Wayne Airport | Burbank Airport | Ontario International | Sea Tac
        | Tacoma Airport | Metropolitan Wayne County | Metro Airport | Tampa International | Orlando International
        | Palm Beach International | Hopkins Airport | Hopkins International | Bradley Field
        | Bradley International Airport | Pearson Airport | Pearson International | Mirabel Airport
        | Dorval Airport | Heathrow | Heathrow Airport | Gatwick | Gatwick Airport | Stansted Airport
        | Charles de Gaulle | Orly | Orly Airport | Schiphol | Fiumicino | Ciampino Airport | Malpensa
        | Malpensa Airport | Linate Airport | Barajas Airport | Tegel Airport | Tempelhof Field | Narita
        | Narita Airport | Haneda Airport | Kingsford Smith Airport | Will Rogers Airport | Standiford Field
        | Truax Field | Billy Bishop Airport | Blue Grass Airport | Eppley Airfield | Bush Intercontinental
        | Hector International | Sunport | Muhammad Ali International Airport | Louis Armstrong Airport""",
    "airport_code": """
        ATL | BOS | BWI | CLE | CLT | CVG | DCA | DEN | DFW | DTW | EWR | FLL | HNL | HOU | IAD | IAH | JFK | LAS
        | LAX | LGA | MCI | MCO | MDW | MEM | MIA | MKE | MSP | MSY | OAK | ORD | PDX | PHL | PHX | PIT | RDU
        | SAN | SEA | SFO | SJC | SLC | STL | TPA | YYZ | YUL | YVR | LHR | LGW | CDG | ORY | AMS | FRA | MUC
        | ZRH | GVA | VIE | FCO | MXP | LIN | MAD | BCN | LIS | CPH | ARL | OSL | HEL | WAW | PRG | BUD | ATH
        | IST | CAI | DXB | DOH | BOM | DEL | BKK | SIN | HKG | NRT | HND | ICN | PEK | PVG | SYD | MEL | AKL
        | GRU | EZE | BOG | LIM | SCL | MEX | CUN | HAV""",
    "aircraft_code": """
        747 | 737 | 727 | 757 | 767 | 777 | 787 | A319 | A320 | A330 | A340 | A380 | DC10 | DC9 | D9S | D10 | MD80
        | M80 | L1011 | 73S | 72S | 74M | J31 | BE1 | CRJ | ATR | F28 | Boeing 747 | Boeing 767 | Boeing 737
        | Boeing 757 | Airbus A320 | Airbus A300 | McDonnell Douglas 80 | Fokker 100 | Saab 340 | Dash 8
        | Concorde | Tristar""",
    "flight_number": " | ".join(str(number) for number in range(3, 4000, 17)),
    "fare_amount": " | ".join(f"{n} dollars | ${n} | {n + 20} dollars" for n in range(100, 1500, 50)),
}
CLOSED = {  # a value is for all parts
    "day_name": "Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday",
    "month_name": """
        January | February | March | April | May | June | July | August | September | October | November
        | December""",
    "day_number": """
        first | second | third | fourth | fifth | sixth | seventh | eighth | ninth | tenth | eleventh | twelfth
        | thirteenth | fourteenth | fifteenth | sixteenth | seventeenth | eighteenth | nineteenth | twentieth
        | twenty first | twenty second | twenty third | twenty fourth | twenty fifth | twenty sixth | twenty seventh
        | twenty eighth | twenty ninth | thirtieth | thirty first | 1st | 2nd | 3rd | """
        + " | ".join([*map(str, range(1, 32)), *(f"{day}th" for day in range(4, 21))]),
    "year": "1991 | 1992 | 1993 | 2024 | 2025 | 2026 | 2027 | next year | this year",
    "period_of_day": "morning | afternoon | evening | night | noon | mornings | evenings | afternoons",
    "period_mod": "early | late | mid | very early",
    "time": """
        noon | midnight | half past nine | 9 | 7 | 1700 | 1845 | 2100 | 745 am | 1030 am | 530 pm | 615 pm
        | 5 o'clock pm | 8 o'clock am | """
        + " | ".join(form for hour in range(1, 13) for form in (
            f"{hour} am", f"{hour} pm", f"{hour} o'clock", f"{hour}:{5 * (hour - 1):02} am", f"{hour}:30 pm")),
    "time_relative": "after | before | around | at about | by | not before | no later than | later than | at around",
    "today_relative": "today | tomorrow | tonight | the day after tomorrow | this week | next week",
    "date_relative": "next | this coming | the following | this | the first",
    "cost_relative": """
        cheapest | least expensive | lowest | most expensive | lowest priced | cheap | low | highest | inexpensive""",
    "class_type": """
        first class | coach | business class | economy class | coach class | business | thrift | premium economy
        | second class""",
    "economy": "economy | coach economy",
    "fare_basis_code": "Q | QX | QW | QO | Y | YN | F | FN | H | HN | B | BH | BN | K | KN | M | V | C | S | J",
    "restriction_code": "AP / 57 | AP 57 | AP / 80 | AP 80 | AP / 55 | AP 68 | VU / 1 | VU 1 | NR 7 | AP 7",
    "booking_class": "C | Y | F | FN | Q | B | H | J | class C | class Y | class F | class Q",
    "meal": "breakfast | lunch | dinner | a snack | snacks | meals | a meal | supper | brunch | drinks",
    "meal_description": "hot | cold | vegetarian | kosher | vegan | light | special | halal | gluten free",
    "meal_code": "S | SB | D / S | L / S | B | BR | D | SD / D | LS | L",
    "transport_type": """
        rental car | car | limousine | limo | taxi | cab | bus | train | shuttle | shuttle bus | subway
        | airport limousine | rental cars | taxis | trains""",
    "flight_mod": """
        earliest | latest | last | first | next | longest | shortest | overnight | very first | red eye | fastest""",
    "flight_stop": "nonstop | non stop | direct | one stop | two stop",
    "flight_days": "daily | weekday | weekend | every day | seven days a week",
    "flight_time": """
        departure times | departure time | arrival times | arrival time | schedule | schedules | times
        | flight time | timetable""",
    "round_trip": "round trip | one way | return | two way | round-trip",
    "mod": "largest | smallest | biggest | best known | shortest | main",
}
LISTS = {"start_time": "time", "end_time": "time"}  # slots whose values have a list of another name


# ----------------------------------------------------------------------------------------------------------------------
# The grammar: {name} stands for one of a rule's alternatives, <slot> for a value, <slot=text> for a fixed one

RULES = {
    "from": """
        <fromloc.city_name> | <fromloc.city_name> | <fromloc.city_name> | <fromloc.city_name>
        | <fromloc.city_name> | <fromloc.city_name> <fromloc.state_name>
        | <fromloc.city_name> <fromloc.state_code> | <fromloc.airport_code> | <fromloc.airport_name>
        | <fromloc.airport_name> in <fromloc.city_name>""",
    "to": """
        <toloc.city_name> | <toloc.city_name> | <toloc.city_name> | <toloc.city_name> | <toloc.city_name>
        | <toloc.city_name> <toloc.state_name> | <toloc.city_name> <toloc.state_code> | <toloc.airport_code>
        | <toloc.airport_name> | <toloc.country_name> | the <toloc.city_name> area""",
    "route": """
        from {from} to {to} | from {from} to {to} | from {from} to {to} | to {to} from {from}
        | between {from} and {to} | leaving {from} for {to} | that leave {from} and arrive in {to}
        | departing from {from} and arriving at {to} | out of {from} into {to} | {from} to {to}
        | going from {from} to {to} | that go to {to} from {from} | for {to} that leave from {from}
        | flying from {from} to {to}""",
    "via": """
        via <stoploc.city_name> | with a stop in <stoploc.city_name> | with a stopover in <stoploc.city_name>
        | that stops in <stoploc.city_name> | through <stoploc.city_name>
        | with a layover at <stoploc.airport_code> | <connect=connecting> in <stoploc.city_name>
        | with a <connect=connection> at <stoploc.airport_name>
        | <connect=connecting> through <stoploc.airport_code> | by way of <stoploc.city_name> <stoploc.state_code>
        | stopping over at <stoploc.airport_name>""",
    "when": """
        on <depart_date.day_name> | on <depart_date.day_name>
        | on <depart_date.month_name> <depart_date.day_number>
        | on the <depart_date.day_number> of <depart_date.month_name> | <depart_date.today_relative>
        | <depart_date.date_relative> <depart_date.day_name>
        | on <depart_date.day_name> <depart_date.month_name> <depart_date.day_number>
        | on <depart_date.month_name> <depart_date.day_number> <depart_date.year>
        | on <depart_date.day_name> <or=or> <depart_date.day_name> | leaving on <depart_date.day_name>
        | departing <depart_date.today_relative> | on <depart_date.day_name> the <depart_date.day_number>
        | in <depart_date.month_name> | leaving <depart_date.month_name> <depart_date.day_number>""",
    "time": """
        noon | midnight | half past nine | 9 | 7 | 1700 | 1845 | 2100 | 745 am | 1030 am | 530 pm | 615 pm
        | 5 o'clock pm | 8 o'clock am | """
        + " | ".join(form for hour in range(1, 13) for form in (
            f"{hour} am", f"{hour} pm", f"{hour} o'clock", f"{hour}:{5 * (hour - 1):02} am", f"{hour}:30 pm")),
    "arrive": """
        arriving <arrive_time.time_relative> <arrive_time.time>
        | that arrives <arrive_time.time_relative> <arrive_time.time>
        | arriving in the <arrive_time.period_of_day>
        | arriving <arrive_time.period_mod> in the <arrive_time.period_of_day>
        | arriving on <arrive_date.day_name> | arriving <arrive_date.today_relative>
        | arriving on <arrive_date.month_name> <arrive_date.day_number>
        | that gets in <arrive_date.date_relative> <arrive_date.day_name>
        | landing between <arrive_time.start_time> and <arrive_time.end_time>
        | that gets there <arrive_time.time_relative> <arrive_time.time>
        | landing on <arrive_date.day_name> <arrive_time.period_of_day>
        | to arrive on the <arrive_date.day_number> of <arrive_date.month_name> | to get in at <arrive_time.time>""",
    "back": """
        returning on <return_date.day_name> | returning <return_date.date_relative> <return_date.day_name>
        | and returning on <return_date.month_name> <return_date.day_number>
        | coming back <return_date.today_relative> | returning in the <return_time.period_of_day>
        | and coming back <return_time.period_mod> in the <return_time.period_of_day>
        | with a return on <return_date.day_name> <return_time.period_of_day>
        | returning <return_time.time_relative> <return_time.time>
        | and back on the <return_date.day_number> of <return_date.month_name>""",
    "by": "on <airline_name> | with <airline_name> | flying <airline_name> | on <airline_code> | by <airline_name>",
    "extra": """
        {by} | {by} | {via} | {via} | in <class_type> | in <economy> | serving <meal> | with <meal>
        | that serve a <meal_description> <meal=meal> | with <meal_description> <meal=food> | on a <aircraft_code>
        | using a <aircraft_code> | for <cost_relative=less than> <fare_amount>
        | costing <cost_relative=under> <fare_amount> | at <cost_relative=no more than> <fare_amount>
        | at the <cost_relative> fare | with fare code <fare_basis_code> | with <flight_stop> service
        | without a <connect=connection> | {by} <flight_days> | that are <flight_stop>
        | in booking class <booking_class>""",
    "flights": """
        flights | flights | all flights | the flights | a flight | any flights | <flight_stop> flights
        | a <flight_stop> flight | <round_trip> flights | a <round_trip> flight | <class_type> flights
        | <airline_name> flights | all <airline_name> flights | the <flight_mod> flight
        | the <cost_relative> flight | the <cost_relative> <round_trip> flights | <connect=connecting> flights
        | <depart_time.period_of_day> flights | <depart_date.day_name> <depart_time.period_of_day> flights
        | <flight_days> flights | the <flight_mod> <flight_stop> flight | <airline_code> flights
        | <depart_time.period_mod> <depart_time.period_of_day> flights | the <flight_mod> <airline_name> flight
        | <cost_relative> flights""",
    "this_flight": """
        <airline_name> flight <flight_number> | flight <flight_number> | <airline_code> <flight_number>
        | flight <airline_code> <flight_number> | the <flight_mod> <airline_name> flight
        | flight number <flight_number> | <airline_name> <flight_number> | the <flight_mod> flight {route}""",
    "on_route": "{route} | {route} {when} | {route} {by} | {route} {time}",
    "place": """
        <city_name> | <city_name> | <city_name> | <city_name> <state_name> | <city_name> <state_code>
        | the <city_name> area""",
    "airport": "<airport_name> | <airport_name> | the <airport_name> | <airport_code>",
    "transport": "<transport_type> | <transport_type> | ground transportation | transportation | public transport",
    "on_day": """
        on <day_name> | in the <period_of_day> | <time_relative> <time> | <today_relative>
        | on <month_name> <day_number> | on <day_name> <period_of_day> | |""",
}
OPENERS = {
    "show": """
        show me | please show me | list | please list | give me | find me | find | i would like | i'd like to see
        | i need | i want | i'm looking for | can you find | could you show me | do you have | are there any
        | let me see | can i get | search for | what about | display | i want to see | how about | what are | |""",
    "tell": """
        what is | what's | tell me | please tell me | i'd like to know | can you tell me | give me | show me
        | what are | do you know | i need to know | find out | please give me""",
    "": "",
}
CLOSERS = "| | | | | please | thanks | thank you | if possible"
INTENTS = {  # of each, how many templates; and its questions, {what opens them: alternatives}
    "flight": (640, {
        "show": """
            {flights} {route} | {flights} {route} {when} | {flights} {route} {time}
            | {flights} {route} {when} {time} | {flights} {when} {route} | {flights} {route} {extra}
            | {flights} {route} {via} {when} | {flights} {route} {arrive} | {flights} {route} {when} {arrive}
            | {flights} {route} {when} {back} | {flights} {extra} {route} {when}
            | {flights} {route} {time} {extra} | {flights} from {from} {when} | {flights} to {to} {arrive}
            | {flights} leaving {from} {time} | {flights} into {to} {by}""",
        "": """
            i want to fly {route} {when} | i need to be in <toloc.city_name> {arrive}
            | i'm travelling {route} {when} {time} | does <airline_name> fly {route}
            | does <airline_code> have {flights} {route} {when} | is there {flights} {route} {time}
            | which flights go {route} {extra} | i have to get to {to} from {from} {when} | how do i get {route}
            | i'd like to travel {route} {when} {back} | book me a seat {route} {when}
            | what flights leave {from} for {to} {time} | can i fly {route} {extra}
            | which of these flights {route} is the <flight_mod> | my trip goes {route} {when}""",
    }),
    "airfare": (200, {
        "tell": """
            the fares {route} | the <cost_relative> fare {route} | the airfare for a <round_trip> ticket {route}
            | the price of a <class_type> ticket {route} {when} | the <round_trip> fares {route} {when}
            | <class_type> fares {route} | fares {route} <cost_relative=under> <fare_amount>
            | ticket prices {route} {by} | the fare for {this_flight} | the cost of {this_flight} in <class_type>
            | the <cost_relative> <round_trip> airfare {route} {extra}
            | fares {route} {by} with fare code <fare_basis_code> | <round_trip> prices {route} {back}""",
        "": """
            how much does it cost to fly {route} | how much is a <round_trip> ticket {route} {when}
            | what does a <class_type> seat {route} cost | how much is {this_flight}
            | how much would i pay {route} {when} {back}
            | are there any fares {route} for <cost_relative=less than> <fare_amount>""",
    }),
    "airline": (80, {
        "show": """
            airlines that fly {route} | all airlines {route} {when} | the airlines with {flights} {route}
            | the airlines that serve {place} | airlines that use the <aircraft_code>""",
        "": """
            which airlines fly {route} | what airline is <airline_code> | which airline has {flights} {route}
            | which airlines have <class_type> service {route} | what airlines serve <meal> {route}
            | which carrier flies {route} {when} | who flies into {airport}
            | which airline offers the <cost_relative> fare {route}""",
    }),
    "ground_service": (90, {
        "show": """
            {transport} in {place} | {transport} from {airport} to downtown {place}
            | {transport} between <fromloc.airport_name> and <toloc.city_name> {on_day}
            | {transport} available at {airport} | {transport} from <fromloc.airport_name> into <toloc.city_name>""",
        "": """
            is there {transport} in {place} {on_day} | how can i get from {airport} to downtown {place}
            | what kind of {transport} is there at {airport} | do i need a <transport_type> in {place}
            | can i take a <transport_type> from <fromloc.airport_name> to <toloc.city_name> {on_day}
            | how do i get downtown from {airport}""",
    }),
    "ground_fare": (40, {
        "tell": """
            the price of a <transport_type> in {place} | <transport_type> prices at {airport}
            | the cost of a <transport_type> from {airport} to {place}""",
        "": """
            how much does a <transport_type> cost in {place}
            | how much is a <transport_type> from <fromloc.airport_name> to <toloc.city_name> {on_day}
            | what does it cost to rent a <transport_type> at {airport}
            | what are the <transport_type> rates in {place} {on_day}""",
    }),
    "abbreviation": (50, {
        "tell": """
            the meaning of fare code <fare_basis_code> | fare code <fare_basis_code> | the code <airport_code>
            | restriction <restriction_code> | meal code <meal_code> | the abbreviation <airline_code>
            | booking class <booking_class> | what <airline_code> means | what aircraft code <aircraft_code> means""",
        "": """
            what does fare code <fare_basis_code> mean | what does <airline_code> stand for
            | what does the abbreviation <airline_code> mean | what does restriction <restriction_code> mean
            | explain meal code <meal_code> | what does <meal_code> mean as a meal code
            | what does booking class <booking_class> mean | explain restriction <restriction_code>
            | which airport is <airport_code> | what city does <airport_code> stand for
            | what do the codes <fare_basis_code> <or=or> <fare_basis_code> mean""",
    }),
    "airport": (50, {
        "tell": """
            the name of the <mod> airport in {place} | the airports in {place} | all airports near {place}
            | the <mod> airport of {place} | the airports that <airline_name> serves in {place}""",
        "": """
            which airport is closest to downtown {place} | where is {airport} | what airports are in {place}
            | which airport in {place} does <airline_name> use | which airports have flights to {to}""",
    }),
    "aircraft": (60, {
        "tell": """
            the type of aircraft used on {this_flight} | the plane used {on_route}
            | the <mod> aircraft that <airline_name> flies | the aircraft of {this_flight} {on_day}""",
        "": """
            what kind of plane flies {on_route} | what type of aircraft is used on {this_flight}
            | what is a <aircraft_code> | which planes does <airline_name> use {route}
            | what kind of aircraft leaves {from} {time} | do they fly a <aircraft_code> {route}""",
    }),
    "capacity": (35, {
        "tell": """
            the seating capacity of a <aircraft_code> | the capacity of the <airline_name> <aircraft_code>
            | the number of seats on {this_flight} | the seating capacity of the aircraft {on_route}""",
        "": """
            how many seats does a <aircraft_code> have | how many people fit in a <aircraft_code>
            | how many passengers can {this_flight} take | how many people can fly on the <aircraft_code> {route}
            | how many <class_type> seats are there on a <aircraft_code>""",
    }),
    "city": (35, {
        "tell": """
            the cities that <airline_name> flies to | the cities served by <airline_name> {on_day}
            | all cities that <airline_code> serves from {from} | the city of {airport}""",
        "": """
            which cities does <airline_name> serve | where does <airline_name> fly to from {from}
            | what cities can i reach from {from} {when} | in which city is {airport}
            | where do the {flights} {by} from {from} stop""",
    }),
    "distance": (35, {
        "tell": """
            the distance from {airport} to downtown {place}
            | the distance between <fromloc.city_name> and <toloc.city_name>
            | the distance from <fromloc.airport_name> to <toloc.city_name>""",
        "": """
            how far is {airport} from downtown {place}
            | how far is it from <fromloc.airport_name> to <toloc.city_name>
            | how many miles is it from <fromloc.city_name> to <toloc.city_name>
            | how long is the way from {airport} to the city""",
    }),
    "flight_time": (60, {
        "tell": """
            the <flight_time> of {this_flight} | the <flight_time> {route}
            | <flight_time> for {by} flights {route} {when} | the <flight_time> for flights {route} {when}""",
        "": """
            when does {this_flight} leave | what time does {this_flight} arrive {on_day}
            | how long does {this_flight} take | how long is the flight {route}
            | at what time does the <flight_mod> flight {route} leave""",
    }),
    "flight_no": (35, {
        "tell": """
            the flight number of the <flight_mod> flight {route}
            | the number of the <airline_name> flight {route} {time} | flight numbers {route} {when}""",
        "": """
            which flight number goes {route} {when} | what are the flight numbers of {flights} {route}
            | what is the number of the flight {route} {arrive}""",
    }),
    "meal": (45, {
        "tell": """
            the meals on {this_flight} | the menu of {this_flight} in <class_type>
            | the <meal_description> <meal=meals> on flights {route}""",
        "": """
            what meals are served on {this_flight} | is <meal> served on {this_flight}
            | does {this_flight} serve <meal> | do i get <meal> {route} {by}
            | is there a <meal_description> <meal=meal> on {this_flight}
            | which <meal> is served {route} in <class_type>""",
    }),
    "quantity": (50, {
        "tell": """
            the number of flights {route} | the number of {flights} {route} {when}
            | the number of airports in {place}""",
        "": """
            how many flights does <airline_name> have {route} | how many {flights} are there {route} {when}
            | how many airlines fly {route} | how many <class_type> flights leave {from} {when}
            | how many stops does {this_flight} have | how many cities are served by <airline_name>""",
    }),
    "restriction": (30, {
        "tell": """
            the restrictions on {this_flight} | the restrictions for the <cost_relative> fare {route}
            | the restrictions on <round_trip> fares {route} {by}""",
        "": """
            what restrictions apply to fares <cost_relative=under> <fare_amount> {route}
            | are there restrictions on the <cost_relative> <round_trip> fare {route}
            | does restriction <restriction_code> apply to {this_flight}""",
    }),
    "day_name": (25, {
        "tell": "the days on which {this_flight} flies | the days of the week with flights {route}",
        "": """
            on which days does <airline_name> fly {route} | what days of the week do flights go {route}
            | which day does {this_flight} leave {from}""",
    }),
    "cancel": (30, {
        "": """
            cancel my flight {route} {when} | please cancel {this_flight}
            | i have to cancel my reservation on {this_flight} {on_day} | i want my money back for {this_flight}
            | can i cancel the <round_trip> ticket {route} {when}""",
    }),
}


# ----------------------------------------------------------------------------------------------------------------------
# From the grammar to questions

def one_of(items, rng):
    return items[int(rng.random() * len(items))]  # Python promises that random() stays as it is, not choice()


def expand(text, rng):
    """The text with an alternative in place of each {rule}, and single spaces."""
    while found := re.search("{(.*?)}", text):
        text = text[:found.start()] + one_of(split(RULES[found[1]]), rng) + text[found.end():]
    return " ".join(text.split())


def templates(intent, rng):
    """A list of (opener, template), all different: as many as INTENTS wants, or fewer if there are no more."""
    count, kinds = INTENTS[intent]
    bodies, found = [(opener, body) for opener, text in kinds.items() for body in split(text)], {}
    for _ in range(20 * count):
        if len(found) < count:
            opener, body = one_of(bodies, rng)
            found.setdefault(expand(body, rng), opener)
    return [(opener, template) for template, opener in found.items()]


def values_of(part):
    """{list: its values for a part}: those of training, and for "val" and "test" also those for that part alone."""
    opened = {name: [value for value in split(text) if split_of(f"{name} {value}", HELD_OUT) in ("train", part)]
              for name, text in OPEN.items()}
    return {**opened, **{name: split(text) for name, text in CLOSED.items()}}


def fill(template, values, rng):
    """[(word, tag)] of a template with drawn values. A value's first word is tagged B-slot, its others I-slot."""
    pairs = []
    for slot, text, word in re.findall(r"<([\w.]+)=?(.*?)>|(\S+)", template):
        if word:
            pairs += [(each, "O") for each in WORD.findall(word)]
            continue
        name = slot.rpartition(".")[2]
        words = WORD.findall(text or one_of(values[LISTS.get(name, name)], rng))
        pairs += [(each, f"{'I' if i else 'B'}-{slot}") for i, each in enumerate(words)]
    return pairs


def as_written(pairs):
    """The pairs with a capital at the start, "I", and a mark at the end."""
    first = pairs[0][0]
    mark = "?" if first in ASKING.split() else "."
    pairs = [(re.sub("^i(?=$|')", "I", word), tag) if tag == "O" else (word, tag) for word, tag in pairs]
    return [(pairs[0][0][0].upper() + pairs[0][0][1:], pairs[0][1]), *pairs[1:], (mark, "O")]


def generate():
    """A list of rows, {"words", "tags", "intent", "split"}, always the same."""
    rng, rows, seen = random.Random(SEED), [], set()
    values = {part: values_of(part) for part in ("train", "val", "test")}
    for intent in INTENTS:
        for opener, template in templates(intent, rng):
            part = split_of(template, HELD_OUT)
            for _ in range(QUESTIONS):
                opening, closing = one_of(split(OPENERS[opener]), rng), one_of(split(CLOSERS), rng)
                pairs = fill(f"{opening} {template} {closing}", values[part], rng)
                written = rng.random() < WRITTEN
                pairs = as_written(pairs) if written else [(word.lower(), tag) for word, tag in pairs]
                words, tags = map(list, zip(*pairs))
                if tuple(words) not in seen:
                    seen.add(tuple(words))
                    rows.append({"words": words, "tags": tags, "intent": intent, "split": part})
    return rows


if __name__ == "__main__":
    for row in generate():
        print(row["split"], row["intent"], " ".join(f"{word}/{tag}" for word, tag in zip(row["words"], row["tags"])))
